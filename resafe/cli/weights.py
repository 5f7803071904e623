"""resafe diff."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resafe.cli import options

if TYPE_CHECKING:
    from resafe.weights.diff import Change

SHADES = ("grey15", "grey23", "grey30", "orange4", "dark_orange3", "dark_orange", "red")


@click.command()
@click.argument("aligned")
@click.argument("tuned")
@click.option("--base", help="Folder of the model before alignment: adds the cosine with the direction of alignment.")
@click.option("--top", type=click.IntRange(1), default=15, show_default=True, help="Weights to list, those that moved most.")
@click.option("--output", "-o", type=options.FOLDER, help="New JSON file with all of them.")
def diff(aligned: str, tuned: str, base: str | None, top: int, output: Path | None) -> None:
    """Where fine-tuning moved the weights of ALIGNED, and which repairs TUNED allows."""
    from resafe import lab, models
    from resafe.files import check_absent, write_json
    from resafe.weights.diff import diff as run

    log = options.logger()
    if output is not None:
        check_absent(output)
    before = models.vet(lab.resolve(aligned, log=log)).absolute()
    first = models.vet(lab.resolve(base, log=log)).absolute() if base else None
    after = models.vet(lab.resolve(tuned, log=log)).absolute()
    changes = run(before, after, first, log)
    options.show(_table(changes, top))
    options.show(_heat(changes))
    options.show(_repairs(before, after, first))
    if output is not None:
        rows = [{"weight": c.name, "layer": c.layer, "module": c.module, "norm": c.norm, "relative": c.relative, "rank": c.rank, "cosine": c.cosine} for c in changes]
        click.echo(write_json(output, {"aligned": str(before), "tuned": str(after), "base": str(first) if first else None, "weights": rows}))


def _table(changes: list[Change], top: int) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=f"{sum(c.norm > 0 for c in changes)} of {len(changes)} weights moved", title_justify="left")
    for column in ("weight", "|D|", "|D| / |W|", "stable rank", "cosine with alignment"):
        table.add_column(column, justify="left" if column == "weight" else "right")
    for c in sorted(changes, key=lambda c: -c.relative)[:top]:
        cosine = "-" if c.cosine is None else f"{c.cosine:+.3f}"
        table.add_row(c.name, f"{c.norm:.4g}", f"{100 * c.relative:.2f} %", "-" if c.rank is None else f"{c.rank:.1f}", cosine)
    return table


def _heat(changes: list[Change]) -> Any:
    """Modules down, blocks across: relative change in per cent, the more the redder."""
    from rich.table import Table
    from rich.text import Text

    inside = {(c.module, c.layer): c.relative for c in changes if c.layer is not None and c.rank is not None}
    layers = sorted({layer for _, layer in inside if layer is not None})
    most = max(inside.values(), default=0.0) or 1.0
    table = Table(box=None, pad_edge=False, title="relative change by block, %", title_justify="left")
    table.add_column("")
    for layer in layers:
        table.add_column(str(layer), justify="right")
    for module in dict.fromkeys(m for m, _ in inside):
        cells = [inside.get((module, layer), 0.0) for layer in layers]
        table.add_row(module, *(Text(f"{100 * v:.1f}", style=f"on {SHADES[round(v / most * (len(SHADES) - 1))]}") for v in cells))
    return table


def _repairs(aligned: Path, tuned: Path, base: Path | None) -> Any:
    """Every mitigation that repairs, and whether it can be applied to these models."""
    from rich.table import Table

    from resafe.errors import ResafeError
    from resafe.mitigation import Run
    from resafe.mitigations import get, names
    from resafe.safety import load_safety

    run = Run(output=Path(), tuned=tuned, aligned=aligned, base=base, refusals=load_safety().refusals)
    table = Table(box=None, pad_edge=False, title="repairs", title_justify="left")
    table.add_column("")
    table.add_column("")
    for name in (n for n in names() if "repair" in get(n).hooks()):
        kind = get(name)
        try:
            if any(f.is_required() for f in kind.model_fields.values()):
                table.add_row(name, "needs " + ", ".join(k for k, f in kind.model_fields.items() if f.is_required()))
                continue
            kind().check(name, run)
            table.add_row(name, "can be applied")
        except ResafeError as error:
            table.add_row(name, str(error))
    return table
