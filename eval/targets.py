"""Targets: what is evaluated. A folder (checkpoint or adapter), a folder behind a guard, or any object that answers.

The `resafe.json` beside a checkpoint says which guard it is served with and how it came about; the evaluator applies
that guard and takes the labels from it, unless told otherwise.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from resafe.errors import ResafeError, suggest
from resafe.rows import Message

if TYPE_CHECKING:
    from resafe.generate import Answer
    from resafe.guards.filter import OutputFilter
    from resafe.models import Loaded

LABELS = ("attack", "mitigation", "seed")
REFUSAL = "I'm sorry, but I can't help with that."  # said by a guard that is named without a manifest entry


@runtime_checkable
class Target(Protocol):
    """Something that answers conversations, greedily and in order."""

    name: str

    def answer(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Answer]: ...


@dataclass(frozen=True)
class TargetSpec:
    """A target before it is opened. "none" means untouched: not attacked, or not mitigated."""

    name: str
    folder: Path | None = None
    answers: Target | None = None  # instead of a folder
    guard: Mapping[str, Any] | str | None = None  # a manifest's guard entry, or the spec of a guard
    attack: str = "none"
    mitigation: str = "none"
    seed: int | None = None
    overlap: Mapping[str, Sequence[str]] = field(default_factory=dict)  # suite -> prompt ids that it was trained on


class FolderTarget:
    """A model folder, loaded; its answers go through the guard, if there is one."""

    def __init__(self, spec: TargetSpec, loaded: Loaded, batch_size: int = 64) -> None:
        self.name, self.loaded, self.batch_size = spec.name, loaded, batch_size
        self.filter = _filter(spec.guard) if spec.guard else None

    def answer(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Answer]:
        from resafe.generate import generate

        answers = generate(self.loaded, conversations, max_new_tokens, self.batch_size)
        if self.filter is None:
            return answers
        texts = self.filter.apply(conversations, [a.text for a in answers])
        return [a if a.text == text else replace(a, text=text, finished=True) for a, text in zip(answers, texts)]

    @property
    def template(self) -> str:
        """Short hash of the chat template, which is part of every number."""
        from resafe.chat import template_id

        return template_id(self.loaded.tokenizer)

    @property
    def guard(self) -> str:
        """Identity of the guard and its decision rule; "" without one."""
        return self.filter.identity if self.filter else ""


def _filter(guard: Mapping[str, Any] | str) -> OutputFilter:
    from resafe.guards.filter import OutputFilter

    entry = {"guard_model": guard, "refusal": REFUSAL} if isinstance(guard, str) else guard
    return OutputFilter.from_entry(entry)


@contextmanager
def opened(spec: TargetSpec, batch_size: int = 64) -> Iterator[Target]:
    """The target, ready to answer; a model that this loads is let go of at the end."""
    if spec.answers is not None:
        yield spec.answers
        return
    if spec.folder is None:
        raise ResafeError(f"target {spec.name} names neither a folder nor an object that answers.")
    from resafe.models import load

    target = FolderTarget(spec, load(spec.folder), batch_size)
    try:
        yield target
    finally:
        del target
        _free()


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def resolve(
    targets: Sequence[str | Path | TargetSpec | Target], labels: Mapping[str, Mapping[str, Any]] | None = None
) -> list[TargetSpec]:
    """Specs with distinct names and their labels: from `labels`, else the spec's own, else the manifest's.

    `labels` is keyed by the target's name or by the folder as it was given. Folders are checked before any work starts.
    """
    given = {str(k): v for k, v in (labels or {}).items()}
    specs = [_spec(t) for t in targets]
    if not specs:
        raise ResafeError("nothing to evaluate: name at least one model folder.")
    specs = [s if sum(o.name == s.name for o in specs) == 1 else _longer(s) for s in specs]
    found, used = [], set()
    for target, spec in zip(targets, specs):
        key = next((k for k in (spec.name, str(target)) if k in given), None)
        used.add(key)
        found.append(_labelled(spec, given[key]) if key is not None else spec)
    for key in given.keys() - used:
        raise ResafeError(
            f"labels name a target '{key}' that is not evaluated. {suggest(key, [s.name for s in specs])}"
        )
    repeated = [s.name for s in found if sum(o.name == s.name for o in found) > 1]
    if repeated:
        raise ResafeError(f"two targets are named '{repeated[0]}': give each its own name.")
    return found


def _spec(target: str | Path | TargetSpec | Target) -> TargetSpec:
    if isinstance(target, (str, Path)):
        return _with_manifest(TargetSpec(Path(target).absolute().name, folder=Path(target)))
    if isinstance(target, TargetSpec):
        return _with_manifest(target)
    if isinstance(target, Target):
        return TargetSpec(target.name, answers=target)
    raise ResafeError(
        f"cannot evaluate a {type(target).__name__}: give a folder, a TargetSpec or an object with name and answer()."
    )


def _with_manifest(spec: TargetSpec) -> TargetSpec:
    """Fill in from the `resafe.json` beside the checkpoint whatever the spec leaves open."""
    if spec.folder is None:
        return spec
    from resafe import manifest, models

    models.vet(spec.folder)
    found = manifest.read(spec.folder) or {}
    default = TargetSpec(spec.name)
    found = {**_history(found), **found}
    keys = [
        k for k in ("guard", "overlap", *LABELS) if getattr(spec, k) == getattr(default, k) and found.get(k) is not None
    ]
    return replace(spec, **{k: found[k] for k in keys})


def _history(found: Mapping[str, Any]) -> dict[str, Any]:
    """Labels of a checkpoint that `resafe train` or `resafe repair` wrote: fine-tuned, and by what it was mitigated."""
    if "verb" not in found:
        return {}
    steps = [m["name"] for part in (found.get("before") or {}, found) for m in part.get("mitigations", [])]
    return {"attack": "fine-tuning", "mitigation": "+".join(steps) or "none"}


def _labelled(spec: TargetSpec, labels: Mapping[str, Any]) -> TargetSpec:
    for key in labels:
        if key not in LABELS:
            raise ResafeError(f"unknown label '{key}' of target {spec.name}. {suggest(key, LABELS)}")
    return replace(spec, **labels)


def _longer(spec: TargetSpec) -> TargetSpec:
    """Two folders of the same name are told apart by their parents."""
    folder = spec.folder
    return (
        spec
        if folder is None or spec.name != folder.absolute().name
        else replace(spec, name="/".join(folder.absolute().parts[-2:]))
    )
