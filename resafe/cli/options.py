"""Options that several commands share, and the progress line on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from resafe.errors import ResafeError

FOLDER = click.Path(path_type=Path)


def local(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
    """Refuse a URL where a folder is written: uploads could not appear whole or not at all."""
    if ":/" in str(value):  # pathlib makes one slash of two
        raise ResafeError("--output is a local folder, and a URL was given: write it here, then copy it there.")
    return value



mitigation = click.option(
    "--mitigation", "-m", "mitigations", multiple=True, metavar="NAME[:key=value,...]", help="A defence; repeat to compose. See: resafe list."
)
output = click.option("--output", "-o", required=True, type=FOLDER, callback=local, help="New folder for the result.")
seed = click.option("--seed", default=0, show_default=True, help="Decides every random choice.")
safety_data = click.option(
    "--safety-data", metavar="default|lab|FILE", help="Safety rows (JSONL); default: the pack that ships with resafe."
)
heldout = click.option("--heldout", type=FOLDER, help="JSONL rows that measure utility for methods that calibrate themselves.")


store = click.option(
    "--store", metavar="FOLDER|none", help="Where answers and verdicts are kept, readable by you only; default: ~/.cache/resafe/store. The same command goes on from there."
)


def store_folder(value: str | None) -> Path | None:
    """The folder that --store names; None for 'none'."""
    from resafe.fingerprint import cache_home

    return None if value == "none" else Path(value) if value else cache_home() / "store"


def show(table: Any) -> None:
    """Print a table on stdout, wide enough for its columns wherever stdout goes."""
    from rich.console import Console

    console = Console()
    Console(width=max(console.width, 144)).print(table)


@contextmanager
def unread_is_no_fault() -> Iterator[None]:
    """What is printed within may go unread (`| head -1`): the exit code is still the command's own, not that of a closed pipe."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # rich makes an exit of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter stumbles over it again at its end


def logger() -> Callable[[str], None]:
    """Lines about what is going on, on stderr, so that stdout holds results only."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)

    def say(line: str) -> None:
        try:
            console.print(line, style="dim", markup=False, soft_wrap=True)  # one line stays one line in a log
        except (BrokenPipeError, SystemExit):  # nobody reads it (rich makes an exit of that): the work goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    return say
