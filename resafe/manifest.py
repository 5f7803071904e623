"""`resafe.json`: what was done to a checkpoint, with what, and the guard to serve it with."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from resafe.files import write_json
from resafe.models import read_config

NAME = "resafe.json"
STACK = ("torch", "transformers", "trl", "peft", "datasets", "safetensors")


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest beside a checkpoint, if there is one."""
    file = Path(folder) / NAME
    return read_config(file) if file.is_file() else None


def write(folder: Path, entries: Mapping[str, Any]) -> Path:
    """Write `entries` with the versions of resafe and of the stack it ran on."""
    return write_json(folder / NAME, {"resafe": _version("resafe"), **entries, "versions": {p: _version(p) for p in STACK}})


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
