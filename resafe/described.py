"""What people describe in YAML files: read without code, no key twice, and every fault told in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from resafe.errors import ResafeError, suggest


class _Once(yaml.SafeLoader):
    """PyYAML's safe loader, which alone would let the last of two equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key '{key.value}' stands there twice", key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read(file: Path, what: str) -> Any:
    """The content of a YAML file in UTF-8. Raises ResafeError for no such file (called `what`), other content, and keys that stand there twice."""
    if not file.is_file():
        raise ResafeError(f"no such {what}: {file}")
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=_Once)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # no UTF-8, no date, no number, too deep
        raise ResafeError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None


def fault(error: ValidationError, keys: Mapping[int, Iterable[str]], within: str = "") -> str:
    """The first fault that pydantic found: where (below `within`) and what; a misspelt key with the nearest known one.

    `keys` holds the known keys by their depth, 1 for the outermost.
    """
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a misspelt key also leaves one missing
    where = ".".join(map(str, (*([within] if within else []), *first["loc"])))
    if first["type"] == "extra_forbidden":
        return f"unknown key '{where}'. {suggest(str(first['loc'][-1]), keys[len(first['loc'])])}"
    found = f" (found {first['input']!r:.60})" if isinstance(first["input"], str | float | int | None) else ""
    return f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}{found}."
