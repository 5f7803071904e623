"""resafe list, resafe info."""

from __future__ import annotations

import inspect
import re

import click


@click.command("list")
def list_() -> None:
    """The mitigations at hand."""
    from rich.console import Console
    from rich.table import Table

    from resafe.mitigations import get, names

    table = Table(box=None, pad_edge=False)
    for column in ("name", "acts", "what it does"):
        table.add_column(column)
    for name in names():
        table.add_row(name, get(name).stage(), get(name).title())
    Console().print(table)


@click.command()
@click.argument("name")
def info(name: str) -> None:
    """Parameters, defaults, needs and paper of one mitigation."""
    from resafe.mitigations import get

    kind = get(name)
    click.echo(f"{name}  (acts at: {', '.join(kind.hooks())})\n")
    click.echo(f"{inspect.getdoc(inspect.getmodule(kind))}\n\nParameters")
    for key, field in kind.model_fields.items():
        default = "required" if field.is_required() else f"default {field.default!r}"
        shape = re.sub(r"typing\.|<class '(\w+)'>", r"\1", str(field.annotation))
        click.echo(f"  {key}  {shape}, {default}" + (f": {field.description}" if field.description else ""))
    needs = kind.needs
    wants = [n for n, on in (("the model before alignment (--base)", needs.base), ("the model before fine-tuning (--aligned)", needs.aligned), ("safety rows", needs.safety)) if on]
    works = [n for n, on in (("LoRA", needs.lora), ("full", needs.full), ("4/8-bit bases", needs.quantised)) if on]
    click.echo(f"\nNeeds     {'; '.join(wants) or 'nothing'}\nWorks on  {', '.join(works)}")
