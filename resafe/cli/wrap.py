"""resafe run, plan, env, receipts, hook, mix: mitigations in front of a training command that already works."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resafe.cli import options

if TYPE_CHECKING:
    from resafe.finetune.launch import Request

COMMAND = {"allow_interspersed_args": False}  # what follows the first word of the command is the command's
command = click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
mix_mode = click.option("--mix-mode", envvar="RESAFE_MIX_MODE", type=click.Choice(["append", "replace"]), help="mix_safety: more rows and steps, or as many as before.")
kept = click.option("--receipts", type=options.FOLDER, help="Keep the receipts in this new folder; a shared one where the command starts processes on other machines.")


def _flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """--mitigation, --safety-data, --mix-mode and --seed, each also as an environment variable."""
    seed = click.option("--seed", type=int, envvar="RESAFE_SEED", default=0, show_default=True, help="Decides every random choice.")
    safety = click.option("--safety-data", envvar="RESAFE_SAFETY_DATA", metavar="default|lab|FILE", help="Safety rows (JSONL); default: the pack that ships with resafe.")
    for option in (seed, mix_mode, safety, options.mitigation):
        function = option(function)
    return function


@click.command(context_settings=COMMAND)
@_flags
@kept
@click.option("--aligned", type=options.FOLDER, help="Model before fine-tuning, for repairs [default: the one that training started from].")
@click.option("--base", type=options.FOLDER, help="Model before alignment, for repairs that need it.")
@click.option("--output", "-o", type=options.FOLDER, help="Folder for the repaired model [default: SAVED-repaired].")
@command
def run(command: tuple[str, ...], aligned: Path | None, base: Path | None, output: Path | None, **flags: Any) -> None:
    """Run a training COMMAND, unchanged, with mitigations; exit code 3 if they were not applied.

    \b
    resafe run --mitigation mix_safety -- accelerate launch train.py --lr 2e-5
    """
    from resafe.finetune import launch

    launch.end(launch.run(_request(command, aligned=aligned, base=base, output=output, **flags), options.logger()))


@click.command(context_settings=COMMAND)
@_flags
@command
def plan(command: tuple[str, ...], **flags: Any) -> None:
    """What a run would take: rows, steps, tokens, and time from a short probe. Nothing is saved.

    \b
    resafe plan --mitigation mix_safety -- python train.py
    resafe plan -- resafe train --model ./llama --data d.jsonl --mitigation mix_safety -o out
    """
    from resafe.finetune import launch

    code, facts = launch.plan(_request(command, **flags), options.logger())
    if facts:
        options.show(_table(facts))
        if speed := facts["seconds_per_step"]:
            processes = f"{facts['processes']} process{'es' * (facts['processes'] > 1)}"
            click.echo(f"{1000 * speed:.1f} ms a step on {processes}: the median of a short probe of {facts['trainer']}. Nothing was saved.")
    launch.end(code)


def _table(facts: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", "as it is", "with mitigations"):
        table.add_column(column, justify="left" if not column else "right")
    for name, key in (("rows", "rows"), ("tokens a pass", "tokens"), ("optimiser steps", "steps")):
        before, after = facts.get(f"{key}_before"), facts.get(key, facts.get(f"{key}_before"))
        table.add_row(name, *("not known" if v is None else f"{v:,}" for v in (before, after)))
    speed = facts["seconds_per_step"]
    shown = ["not known" if speed is None or facts.get(k) is None else _time(speed * facts[k]) for k in ("steps_before", "steps")]
    table.add_row("training time, about", *(shown if facts.get("steps") is not None else [shown[0], shown[0]]))
    return table


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@click.command()
@_flags
@click.option("--receipts", type=options.FOLDER, required=True, help="Folder that every process of the job can write to.")
def env(receipts: Path, **flags: Any) -> None:
    """Print the exports that put mitigations in front of every command of a job script."""
    from resafe.finetune import launch

    click.echo(launch.exports(_request((":",), receipts=receipts, **flags)))


@click.command()
@click.argument("folder", type=options.FOLDER)
def receipts(folder: Path) -> None:
    """Check the receipts of a job that ran with `resafe env`; exit code 3 if the mitigation was not applied."""
    from resafe.finetune import receipts as files

    verdict = files.judge(files.read(folder))
    if verdict.problem:
        click.echo(f"resafe: {'the run does not count' if verdict.applied else 'the mitigation was NOT applied'}: {verdict.problem}", err=True)
        raise SystemExit(3)
    for r in verdict.applied:
        click.echo(f"{', '.join(m['name'] for m in r['mitigations'])}: {r['trainer']}, {r['rows_before']} rows -> {r['rows']}, {r['world']} ranks, mixture {str(r['sha256'])[:12]}")
    for place in verdict.saved + verdict.sharded:
        click.echo(f"saved: {place}" + (f" (shards; {files.merge_command(place)})" if place in verdict.sharded else ""))


@click.group()
def hook() -> None:
    """For commands that set PYTHONPATH anew: the start-up hook in this environment's site-packages."""


@hook.command()
def install() -> None:
    """Write resafe_hook.pth; it acts only below resafe run."""
    from resafe.finetune import hook as files

    click.echo(f"installed {files.install()}")


@hook.command()
def uninstall() -> None:
    """Remove resafe_hook.pth."""
    from resafe.finetune import hook as files

    removed = files.uninstall()
    click.echo(f"removed {removed}" if removed else f"not installed: {files.place()}")


@click.command()
@click.argument("source", type=options.FOLDER)
@_flags
@click.option("--output", "-o", type=options.FOLDER, help="New file for the mixture.")
@click.option("--tokenizer", type=options.FOLDER, help="Model folder whose chat template renders safety rows, for files of plain text.")
@click.option("--dry-run", is_flag=True, help="Say what would be written; write nothing.")
def mix(source: Path, output: Path | None, tokenizer: Path | None, dry_run: bool, **flags: Any) -> None:
    """Mix safety rows into a JSON Lines file, in its own shape, for any training tool."""
    from resafe.errors import ResafeError
    from resafe.finetune.mix import mix_file

    if output is None and not dry_run:
        raise ResafeError("name the new file with -o, or ask for --dry-run.")
    r = _request((":",), **flags)
    facts = mix_file(
        source, None if dry_run else output, r.mitigations or ("mix_safety",), r.safety_data, r.mix_mode, r.seed, tokenizer, options.logger()
    )
    where = "dry run, nothing written" if dry_run else str(output)
    click.echo(f"{where}: {facts['rows_before']} rows -> {facts['rows']} ({facts['added']} safety rows, {facts['shape']}), mixture {facts['sha256']}")


def _request(command: tuple[str, ...], mitigations: tuple[str, ...], **flags: Any) -> Request:
    """Flags, and RESAFE_MITIGATION where no --mitigation was given."""
    from resafe.finetune import environment
    from resafe.finetune.launch import Request

    words = command[1:] if command[:1] == ("--",) else command
    return Request(words, mitigations or tuple(environment.mitigations_of(os.environ)), **flags)
