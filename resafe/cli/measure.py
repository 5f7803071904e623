"""resafe eval, resafe compare."""

from __future__ import annotations

from pathlib import Path

import click

from resafe.cli import options

REAL = ("advbench", "jailbreakbench", "jailbreakbench_benign", "simplesafetytests", "xstest_safe", "xstest_unsafe", "gsm8k")
suite = click.option("--suite", "-s", "suites", multiple=True, help="Suite name or YAML file; repeat. Default: the real suites.")
judge = click.option("--judge", "judges", multiple=True, help="Second judge: offline, lab, a guard spec; repeat. Default: by suite.")
limit = click.option("--limit", type=click.IntRange(1), help="Prompts per suite, drawn by seed.")
batch = click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)


@click.command("eval")
@click.argument("targets", nargs=-1, required=True)
@suite
@judge
@limit
@batch
@click.option("--output", "-o", type=options.FOLDER, help="Folder for results.json, results.csv and report.html.")
@click.option("--reveal", is_flag=True, help="Keep the answers, in transcripts.jsonl (mode 0600).")
@options.seed
def evaluate(targets: tuple[str, ...], suites: tuple[str, ...], judges: tuple[str, ...], limit: int | None, batch_size: int,
             output: Path | None, reveal: bool, seed: int) -> None:  # fmt: skip
    """Measure harmfulness, over-refusal, coherence and utility of model folders."""
    _measure(targets, suites, judges, limit, batch_size, output, output / "report.html" if output else None, reveal, seed, None)


@click.command()
@click.argument("targets", nargs=-1, required=True)
@suite
@judge
@limit
@batch
@click.option("--html", type=options.FOLDER, default=Path("report.html"), show_default=True)
@click.option("--output", "-o", type=options.FOLDER, help="Folder for results.json and results.csv.")
@options.seed
def compare(targets: tuple[str, ...], suites: tuple[str, ...], judges: tuple[str, ...], limit: int | None, batch_size: int,
            html: Path, output: Path | None, seed: int) -> None:  # fmt: skip
    """Compare BEFORE TUNED [REPAIRED...] on the same prompts, with paired tests against TUNED."""
    from resafe.errors import ResafeError

    if len(targets) < 2:
        raise ResafeError("compare needs at least two folders: the model before fine-tuning and the fine-tuned one.")
    _measure(targets, suites, judges, limit, batch_size, output, html, False, seed, "fine-tuning")


def _measure(targets: tuple[str, ...], suites: tuple[str, ...], judges: tuple[str, ...], limit: int | None, batch_size: int,
             output: Path | None, html: Path | None, reveal: bool, seed: int, attack: str | None) -> None:  # fmt: skip
    """Evaluate, print the table, write the report; with `attack`, targets are before, tuned, repaired..."""
    from resafe import lab
    from resafe.errors import ResafeError
    from resafe.eval import evaluate as run
    from resafe.eval import table
    from resafe.recipes.tell import compared, report

    if html and html.is_dir() or output and output.is_file():
        raise ResafeError(f"{html if html and html.is_dir() else output} is in the way: --html names a file, --output a folder.")
    log = options.logger()
    folders = [str(lab.resolve(t, log=log)) for t in targets]
    labels = compared(folders, attack) if attack else None
    results = run(folders, suites or REAL, judges or None, limit, output, batch_size, labels, seed, reveal, log)
    options.show(table(results))
    if html:
        click.echo(f"Report: {report(results, html)}")
