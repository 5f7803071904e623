"""resafe train, resafe repair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from resafe.cli import options


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
@click.argument("tuned", type=options.FOLDER)
@click.option("--aligned", help="Folder of the model before fine-tuning, or 'lab'.")
@click.option("--base", help="Folder of the model before alignment (pre-trained), or 'lab:base'.")
@click.option("--data", type=options.FOLDER, help="JSONL rows of the user's task: replayed, and the measure of utility.")
@options.mitigation
@options.output
@options.safety_data
@options.heldout
@options.seed
def repair(tuned: Path, aligned: str | None, base: str | None, data: Path | None, mitigations: tuple[str, ...], output: Path,
           safety_data: str | None, heldout: Path | None, seed: int) -> None:  # fmt: skip
    """Put safety back into a finished fine-tune (a full checkpoint or a LoRA adapter)."""
    from resafe import lab
    from resafe.finetune.repair import repair as run

    log = options.logger()
    before = lab.resolve(aligned, log=log) if aligned else None
    first = lab.resolve(base, log=log) if base else None
    click.echo(run(tuned, output, mitigations, before, data, safety_data, heldout, seed, log, first))


def _first(error: ValueError) -> str:
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"--{'-'.join(str(p) for p in first['loc'])}: {first['msg']} (found {first.get('input')!r})."
