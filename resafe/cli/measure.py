"""resafe eval, resafe compare, resafe judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from resafe.cli import options

SERVED = ("chat:", "batch:", "openai:", "vllm:")
REAL = ("advbench", "jailbreakbench", "jailbreakbench_benign", "simplesafetytests", "xstest_safe", "xstest_unsafe", "gsm8k")
suite = click.option("--suite", "-s", "suites", multiple=True, help="Suite name or YAML file; repeat. Default: the real suites.")
judge = click.option("--judge", "judges", multiple=True, help="Second judge: offline, lab, a guard spec; repeat. Default: by suite.")
limit = click.option("--limit", type=click.IntRange(1), help="Prompts per suite, drawn by seed.")
batch = click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
variant = click.option("--variant", "variants", multiple=True, help="Ask in another way besides: prefill, assistant_system, safety_system, sampled, or a YAML file; repeat.")
workers = click.option("--workers", type=click.IntRange(1), default=8, show_default=True, help="Requests to an endpoint at a time.")
pace = click.option("--requests-per-minute", type=click.FloatRange(0, min_open=True), help="Bound on requests to an endpoint.")
lm_eval = click.option("--lm-eval", "tasks", multiple=True, help="Task of lm-evaluation-harness (pip install 'resafe[lmeval]'); repeat.")


@click.command("eval")
@click.argument("targets", nargs=-1, required=True)
@suite
@judge
@limit
@batch
@click.option("--output", "-o", type=options.FOLDER, help="Folder for results.json, results.csv and report.html.")
@click.option("--reveal", is_flag=True, help="Put the answers into the output: transcripts.jsonl and transcripts.html (mode 0600).")
@variant
@lm_eval
@workers
@pace
@options.store
@options.seed
def evaluate(targets: tuple[str, ...], output: Path | None, **how: Any) -> None:
    """Measure harmfulness, over-refusal, coherence and utility of models: folders, or chat:MODEL@URL, openai:MODEL, vllm:FOLDER."""
    _measure(targets, output, output / "report.html" if output else None, None, **how)


@click.command()
@click.argument("targets", nargs=-1, required=True)
@suite
@judge
@limit
@batch
@click.option("--html", type=options.FOLDER, default=Path("report.html"), show_default=True)
@click.option("--output", "-o", type=options.FOLDER, help="Folder for results.json and results.csv.")
@variant
@lm_eval
@workers
@pace
@options.store
@options.seed
def compare(targets: tuple[str, ...], html: Path, output: Path | None, **how: Any) -> None:
    """Compare BEFORE TUNED [REPAIRED...] on the same prompts, with paired tests against TUNED."""
    from resafe.errors import ResafeError

    if len(targets) < 2:
        raise ResafeError("compare needs at least two folders: the model before fine-tuning and the fine-tuned one.")
    _measure(targets, output, html, "fine-tuning", **how)


def _measure(targets: tuple[str, ...], output: Path | None, html: Path | None, attack: str | None, *, suites: tuple[str, ...],
             judges: tuple[str, ...], tasks: tuple[str, ...], store: str | None, **how: Any) -> None:  # fmt: skip
    """Evaluate, print the table, write the report; with `attack`, targets are before, tuned, repaired..."""
    from resafe import lab
    from resafe.errors import ResafeError
    from resafe.eval import evaluate as run
    from resafe.eval import render_transcripts, table
    from resafe.recipes.tell import compared, report

    if html and html.is_dir() or output and output.is_file():
        raise ResafeError(f"{html if html and html.is_dir() else output} is in the way: --html names a file, --output a folder.")
    if how.get("reveal") and output is None:
        raise ResafeError("--reveal needs a folder to put the answers in: --output FOLDER.")
    log = options.logger()
    asked = [t if t.startswith(SERVED) else str(lab.resolve(t, log=log)) for t in targets]
    labels = compared(asked, attack) if attack else None
    results = run(
        asked, suites or (() if tasks else REAL), judges or None, output=output, labels=labels, log=log,
        store=options.store_folder(store), lm_eval=tasks, **how,
    )  # fmt: skip
    options.show(table(results))
    if results.transcripts and output:
        click.echo(f"Transcripts, for you only: {render_transcripts(results, output / 'transcripts.html')}")
    if html:
        click.echo(f"Report: {report(results, html)}")


@click.command("judge")
@click.argument("file", type=options.FOLDER)
@click.option("--judge", "name", required=True, help="offline, refusal, harm, rules, keyword_qi, encoder:FOLDER, a guard model's folder, chat:MODEL@URL#FAMILY, ...")
@click.option("--output", "-o", type=options.FOLDER, required=True, help="JSON file for verdicts and, with labels, agreement.")
@click.option("--label-column", metavar="COLUMN", help="0 or 1: whether the response is harmful (or refuses, with --verdict refusal).")
@click.option("--verdict", type=click.Choice(["harmful", "refusal"]), help="What the labels say; default: what the judge says.")
@options.store
def judge_csv(file: Path, name: str, output: Path, label_column: str | None, verdict: str | None, store: str | None) -> None:
    """Score a CSV with the columns prompt and response; with 0/1 labels, say how well the judge agrees with them."""
    from resafe.errors import ResafeError
    from resafe.eval.agreement import judge_file, summary

    if output.resolve() == file.resolve():
        raise ResafeError(f"--output is {file} itself, which holds the rows: name another file.")
    found = judge_file(file, name, label_column, verdict, options.store_folder(store), options.logger())
    found.save(output)
    options.show(summary(found))
    click.echo(f"Verdicts: {output}")
