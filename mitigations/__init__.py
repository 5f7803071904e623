"""The catalogue: every public file in this folder is one mitigation; others register under the entry point group.

`names()` lists them, `get(name)` gives the class, `make("mix_safety:ratio=0.2")` a validated instance.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import yaml
from pydantic import ValidationError

from resafe.errors import ResafeError, suggest
from resafe.mitigation import Mitigation

GROUP = "resafe.mitigations"


@dataclass(frozen=True)
class Named:
    """A mitigation with its public name."""

    name: str
    mitigation: Mitigation

    @property
    def spec(self) -> dict[str, Any]:
        """Name and all parameters, JSON-able: what manifests and cell addresses hold."""
        return {"name": self.name, **self.mitigation.model_dump(mode="json")}

    @property
    def identity(self) -> list[Any]:
        """The spec, and what the files and model folders hold that it names: equal where the result is."""
        from resafe.files import file_digest
        from resafe.fingerprint import model_fingerprint

        found = [p.expanduser() for p in self.mitigation.inputs()]
        return [self.spec, *(model_fingerprint(p) if p.is_dir() else file_digest(p) for p in found)]


@lru_cache(maxsize=1)
def _registry() -> dict[str, str | EntryPoint]:
    """Public name -> module of this package, or a third party's entry point."""
    own = {m.name: f"{__name__}.{m.name}" for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")}
    return _joined(own, entry_points(group=GROUP))


def _joined(own: Mapping[str, str], others: Sequence[EntryPoint] | Any) -> dict[str, str | EntryPoint]:
    found: dict[str, str | EntryPoint] = dict(own)
    for point in others:
        if point.name in found:
            first = found[point.name]
            home = first if isinstance(first, str) else first.value
            raise ResafeError(f"two mitigations are called '{point.name}': {home} and {point.value}. Uninstall or rename one.")
        found[point.name] = point
    return found


def names() -> list[str]:
    """Public names of all mitigations, sorted."""
    return sorted(_registry())


def get(name: str) -> type[Mitigation]:
    """The class of a mitigation. Raises ResafeError with the nearest name if there is none."""
    source = _registry().get(name)
    if source is None:
        raise ResafeError(f"unknown mitigation '{name}'. {suggest(name, names())}")
    loaded = import_module(source) if isinstance(source, str) else source.load()
    if isinstance(source, str):
        classes = [c for c in vars(loaded).values() if isinstance(c, type) and c.__module__ == source and issubclass(c, Mitigation)]
        loaded = classes[0]
    if not (isinstance(loaded, type) and issubclass(loaded, Mitigation)):
        raise ResafeError(f"entry point '{name}' does not name a Mitigation class.")
    return loaded


def make(spec: str | Mapping[str, Any]) -> Named:
    """`"name"`, `"name:key=value,key=value"`, `{"name": ..., key: value}` or `{name: {key: value}}` -> a validated mitigation.

    Raises ResafeError for unknown names and parameters (with the nearest one) and for values out of range.
    """
    name, parameters = _split(spec)
    kind = get(name)
    try:
        return Named(name, kind(**parameters))
    except ValidationError as error:
        raise ResafeError(_explain(name, kind, error)) from None


def stack(specs: Sequence[str | Mapping[str, Any]]) -> list[Named]:
    """`make` for each; refuses the same name twice and two owners of the `step` hook."""
    made = [make(s) for s in specs]
    for i, m in enumerate(made):
        if m.name in {other.name for other in made[:i]}:
            raise ResafeError(f"mitigation '{m.name}' is given twice.")
    owners = [m.name for m in made if "step" in m.mitigation.hooks()]
    if len(owners) > 1:
        raise ResafeError(f"{' and '.join(owners)} both own the optimiser step; at most one of a stack may.")
    return made


def _split(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, Mapping):
        if "name" in spec:
            return str(spec["name"]), {k: v for k, v in spec.items() if k != "name"}
        if len(spec) != 1:
            raise ResafeError(f"a mitigation is one name with its parameters; found {', '.join(map(str, spec)) or 'nothing'}.")
        name, parameters = next(iter(spec.items()))
        if parameters is not None and not (isinstance(parameters, Mapping) and all(isinstance(k, str) for k in parameters)):
            raise ResafeError(f"{name}: its parameters must be a mapping of names to values; found {parameters!r}.")
        return str(name), dict(parameters or {})
    name, _, rest = spec.partition(":")
    return name.strip(), dict(_pair(name, part) for part in re.split(r",(?=\s*\w+\s*=)", rest) if part.strip())


def _pair(name: str, part: str) -> tuple[str, Any]:
    key, sign, value = part.partition("=")
    if not sign:
        raise ResafeError(f"{name}: '{part.strip()}' is not of the form key=value.")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        return key.strip(), value


def _explain(name: str, kind: type[Mitigation], error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{name} has no parameter '{where}'. {suggest(where, kind.model_fields)}"
    return f"{name}: {where + ': ' if where else ''}{first['msg']} (found {first.get('input')!r})."
