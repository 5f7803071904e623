"""resafe train, resafe repair."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resafe.cli import options

if TYPE_CHECKING:
    from resafe.finetune.repair import Job

SEARCHING = ("suites", "limit", "judges", "margin", "doses", "store")


@click.command()
@click.option("--model", required=True, help="Folder of the model to fine-tune, or 'lab'.")
@click.option("--data", required=True, type=options.FOLDER, help="JSONL: messages, prompt+completion, question+answer or instruction+output.")
@options.mitigation
@options.output
@options.safety_data
@options.heldout
@click.option("--full", is_flag=True, help="Train all weights instead of a LoRA.")
@click.option("--lr", type=float, help="Learning rate [default: 2e-4 LoRA, 2e-5 full].")
@click.option("--epochs", type=float, default=3, show_default=True)
@click.option("--batch", type=int, default=8, show_default=True)
@click.option("--accumulate", type=int, default=1, show_default=True, help="Batches per optimiser step.")
@click.option("--rank", type=int, default=16, show_default=True, help="Rank of the LoRA.")
@click.option("--scheduler", type=click.Choice(["constant", "linear", "cosine"]), default="cosine", show_default=True)
@click.option("--max-length", type=int, default=1024, show_default=True, help="Tokens per row.")
@click.option("--save-steps", type=int, default=200, show_default=True, help="Steps between the points from which a run resumes.")
@options.seed
def train(model: str, data: Path, mitigations: tuple[str, ...], output: Path, safety_data: str | None,
          heldout: Path | None, full: bool, rank: int, seed: int, **settings: Any) -> None:  # fmt: skip
    """Fine-tune a model, with mitigations."""
    from resafe import lab
    from resafe.errors import ResafeError
    from resafe.finetune.train import train as run
    from resafe.sft import SFTSettings

    log = options.logger()
    try:
        how = SFTSettings(lora=not full, rank=rank, alpha=2 * rank, **settings)
    except ValueError as error:
        raise ResafeError(_first(error)) from None
    folder = run(lab.resolve(model, log=log), data, output, mitigations, how, safety_data, heldout, seed, log)
    click.echo(folder)


@click.command()
@click.argument("tuned")
@click.option("--aligned", help="Folder (or URL) of the model before fine-tuning, or 'lab'.")
@click.option("--base", help="Folder of the model before alignment (pre-trained), or 'lab:base'.")
@click.option("--data", type=options.FOLDER, help="JSONL rows of the user's task: replayed, and the measure of utility.")
@options.mitigation
@options.output
@options.safety_data
@options.heldout
@options.seed
@click.option("--search", "searching", is_flag=True, help="Find the strength: least harm with utility kept, LERP beside it.")
@click.option("--search-suite", "suites", multiple=True, help="Development prompts for --search, a harmful and a benign suite [default: advbench, xstest_safe].")
@click.option("--search-limit", "limit", type=click.IntRange(1), default=100, show_default=True, help="Prompts per suite, drawn by seed; later evaluations leave them out.")
@click.option("--search-judge", "judges", multiple=True, help="Second judge for --search; repeat. Default: by suite.")
@click.option("--margin", type=click.FloatRange(0, 100, min_open=True, max_open=True), default=2, show_default=True, help="Points of utility that may be lost.")
@click.option("--doses", metavar="A,B,...", help="Values to try, weakest first [default: the method's own].")
@options.store
def repair(tuned: str, aligned: str | None, base: str | None, data: Path | None, mitigations: tuple[str, ...], output: Path,
           safety_data: str | None, heldout: Path | None, seed: int, searching: bool, store: str | None, **how: Any) -> None:  # fmt: skip
    """Put safety back into a finished fine-tune (a full checkpoint or a LoRA adapter).

    Models are folders or URLs that fsspec can read (s3://bucket/model, hf://user/model), which are copied into the cache.

    With --search, the strength of the one method that has one is calibrated: every dose is measured on development prompts and
    on the rows of --heldout, and the curve goes to OUTPUT-search/search.html and search.json.
    """
    from resafe import lab
    from resafe.finetune.repair import perform, plan

    log = options.logger()
    if not searching:
        _check_unused(click.get_current_context())
    before = lab.resolve(aligned, log=log) if aligned else None
    first = lab.resolve(base, log=log) if base else None
    job = plan(lab.resolve(tuned, log=log), output, mitigations, before, data, safety_data, heldout, seed, log, first)
    click.echo(_search(job, store, **how) if searching else perform(job))


def _check_unused(context: click.Context) -> None:
    from click.core import ParameterSource

    from resafe.errors import ResafeError

    for option in context.command.params:
        if str(option.name) in SEARCHING and context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE:
            raise ResafeError(f"{option.opts[0]} belongs to --search: add --search, or leave it out.")


def _search(job: Job, store: str | None, suites: tuple[str, ...], limit: int, judges: tuple[str, ...], margin: float, doses: str | None) -> Path:
    """Search, show the curve and write it beside the output; then repair, or refuse with the reason."""
    from resafe.eval.dose_report import render, table
    from resafe.files import write_json
    from resafe.finetune.search import SUITES, Settings, finish, search

    how = Settings(suites or SUITES, limit, margin / 100, _numbers(doses), judges or None, store=options.store_folder(store))
    found = search(job, how)
    beside = job.run.output.with_name(f"{job.run.output.name}-search")
    options.show(table(found.found))
    write_json(beside / "search.json", found.record)
    page = render(found.found, found.results.meta, f"resafe repair --search: {found.found.method}", beside / "search.html")
    click.echo(f"Dose-response: {page}")
    folder = finish(found)
    click.echo(found.found.why)
    return folder


def _numbers(text: str | None) -> tuple[float, ...] | None:
    from math import isfinite

    from resafe.errors import ResafeError

    try:
        found = [float(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        found = [float("nan")]
    if not all(isfinite(x) for x in found):
        raise ResafeError(f"--doses takes numbers with commas between them, such as 0.1,0.2; found '{text}'.")
    return tuple(found) or None


def _first(error: ValueError) -> str:
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"--{'-'.join(str(p) for p in first['loc'])}: {first['msg']} (found {first.get('input')!r})."
