"""resafe demo, resafe bench, resafe lab."""

from __future__ import annotations

from pathlib import Path

import click

from resafe.cli import options


@click.command()
@click.option("--output", "-o", type=options.FOLDER, default=Path("runs/demo"), show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Number of training seeds; more than one builds lab models.")
def demo(output: Path, seeds: int) -> None:
    """Break the lab model by fine-tuning, repair it with every family, show the table."""
    from resafe.recipes import LAB_DEMO

    _bench(LAB_DEMO, output, list(range(seeds)))


@click.command()
@click.argument("recipe", type=options.FOLDER)
@click.option("--output", "-o", type=options.FOLDER, help="Default: runs/NAME. The same folder resumes.")
@click.option("--seeds", type=click.IntRange(1), help="Use the seeds 0..N-1 instead of the recipe's.")
def bench(recipe: Path, output: Path | None, seeds: int | None) -> None:
    """Run an experiment from a YAML file."""
    _bench(recipe, output, list(range(seeds)) if seeds else None)


def _bench(path: Path, output: Path | None, seeds: list[int] | None) -> None:
    from resafe.recipes.runner import bench as run
    from resafe.recipes.schema import load_recipe
    from resafe.recipes.tell import publish

    recipe = load_recipe(path)
    if seeds:
        recipe = recipe.model_copy(update={"seeds": seeds})
    folder = output or Path("runs") / recipe.name
    results = run(recipe, folder, options.logger())
    table, sentence, html = publish(recipe, results, folder)
    options.show(table)
    for cell, reason in results.meta["refused"].items():
        click.echo(f"{cell} refused: {reason}")
    click.echo(f"\n{sentence}\nReport: {html}")


@click.group()
def lab() -> None:
    """The embedded lab model."""


@lab.command()
@click.option("--seed", default=0, show_default=True, help="0 ships with the package; others are built (minutes) and cached.")
@options.output
def build(seed: int, output: Path) -> None:
    """Write base and aligned checkpoints of a seed to a folder."""
    from resafe.lab import export

    click.echo(export(output, seed, options.logger()))
