"""Targets: what is evaluated. A folder (checkpoint or adapter), a served model, or any object that answers.

The `resafe.json` beside a checkpoint says which guard it is served with and how it came about; the evaluator applies
that guard and takes the labels from it, unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from resafe.backends import Backend, Request, check_spec, open_backend
from resafe.errors import ResafeError, suggest
from resafe.files import digest
from resafe.generate import Answer
from resafe.rows import Message
from resafe.usage import added

if TYPE_CHECKING:
    from resafe.backends.local import Bases
    from resafe.guards.filter import OutputFilter

LABELS = ("attack", "mitigation", "seed")
SERVED = ("chat:", "batch:", "openai:", "vllm:")  # how the specs of back-ends begin (resafe.backends)
REFUSAL = "I'm sorry, but I can't help with that."  # said by a guard that is named without a manifest entry


@runtime_checkable
class Target(Protocol):
    """Something that answers conversations, greedily and in order. For everything else there is `Backend`."""

    name: str

    def answer(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Answer]: ...


@dataclass(frozen=True)
class TargetSpec:
    """A target before it is opened. "none" means untouched: not attacked, or not mitigated."""

    name: str
    folder: Path | None = None
    answers: Target | Backend | None = None  # instead of a folder
    served: str = ""  # spec of a back-end: chat:MODEL@URL, batch:MODEL@URL, openai:MODEL, vllm:FOLDER
    guard: Mapping[str, Any] | str | None = None  # a manifest's guard entry, or the spec of a guard
    attack: str = "none"
    mitigation: str = "none"
    seed: int | None = None
    overlap: Mapping[str, Sequence[str]] = field(default_factory=dict)  # suite -> prompt ids that it was trained on
    cost: Mapping[str, Any] = field(default_factory=dict)  # what making it took: "train", "repair" -> usage
    labelled: bool = True  # whether anybody said what it is: labels, a manifest
    lineage: str = ""  # of a manifest: what it was made from, its training seed apart


class Plain:
    """A `Target` as a back-end: asked for all requests of one length at once, and never remembered."""

    identity, template = None, ""

    def __init__(self, target: Target) -> None:
        self.name, self.target = target.name, target

    def close(self) -> None:
        """Nothing: the target belongs to whoever made it."""

    def rendered(self, request: Request) -> list[Message]:
        """The conversation itself."""
        return list(request.messages)

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Answers by length of request. Raises ResafeError for what only a back-end can do."""
        if any(r.sampling.temperature > 0 for r in requests):
            raise ResafeError(f"target {self.name} only answers greedily: leave out variants that sample.")
        begun = [i for i, r in enumerate(requests) if r.messages[-1]["role"] == "assistant"]
        yield from ((i, Answer(error="prefill_unsupported")) for i in begun)
        for length in dict.fromkeys(r.max_new_tokens for r in requests):
            group = [i for i, r in enumerate(requests) if r.max_new_tokens == length and i not in begun]
            found = self.target.answer([requests[i].messages for i in group], length)
            if len(found) != len(group):
                raise ResafeError(f"target {self.name} gave {len(found)} answers to {len(group)} prompts.")
            yield from zip(group, found)


def output_filter(guard: Mapping[str, Any] | str) -> OutputFilter:
    """The filter that a manifest's entry or a guard's spec describes."""
    from resafe.guards.filter import OutputFilter

    entry = {"guard_model": guard, "refusal": REFUSAL} if isinstance(guard, str) else guard
    return OutputFilter.from_entry(entry)


@contextmanager
def opened(spec: TargetSpec, batch_size: int = 64, bases: Bases | None = None, **serving: Any) -> Iterator[Backend]:
    """The target as a back-end, ready to answer; a model that this loads is let go of at the end.

    Adapters on the same base share it through `bases`. `serving` goes to `resafe.backends.open_backend`.
    """
    if spec.answers is not None:
        yield spec.answers if isinstance(spec.answers, Backend) else Plain(spec.answers)
    elif spec.served:
        served = open_backend(spec.served, **serving)
        try:
            yield served
        finally:
            served.close()
    elif spec.folder is not None:
        from resafe.backends.local import LocalBackend

        backend = LocalBackend(spec.folder, batch_size, bases=bases)
        try:
            yield backend
        finally:
            backend.close()
    else:
        raise ResafeError(f"target {spec.name} names neither a folder, a served model nor an object that answers.")


def resolve(
    targets: Sequence[str | Path | TargetSpec | Target | Backend], labels: Mapping[str, Mapping[str, Any]] | None = None
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
    found = [_told_apart(s, found) if s.lineage and s.name not in given else s for s in found]
    for key in given.keys() - used:
        raise ResafeError(
            f"labels name a target '{key}' that is not evaluated. {suggest(key, [s.name for s in specs])}"
        )
    repeated = [s.name for s in found if sum(o.name == s.name for o in found) > 1]
    if repeated:
        raise ResafeError(f"two targets are named '{repeated[0]}': give each its own name.")
    return found


def _spec(target: str | Path | TargetSpec | Target | Backend) -> TargetSpec:
    if isinstance(target, str) and target.startswith(SERVED):
        return _with_manifest(_served(target))
    if isinstance(target, (str, Path)):
        return _with_manifest(TargetSpec(Path(target).absolute().name, folder=Path(target), labelled=False))
    if isinstance(target, TargetSpec):
        return _with_manifest(target)
    if isinstance(target, (Target, Backend)):
        return TargetSpec(target.name, answers=target, labelled=False)
    raise ResafeError(
        f"cannot evaluate a {type(target).__name__}: give a folder, a TargetSpec or an object with name and answer()."
    )


def _served(target: str) -> TargetSpec:
    kind, _, rest = target.partition(":")
    check_spec(target)
    folder = Path(rest) if kind == "vllm" else None
    name = folder.absolute().name if folder else rest.partition("@")[0]
    return TargetSpec(name, folder=folder, served=target, labelled=False)


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
        k for k in ("guard", "overlap", "cost", "lineage", *LABELS) if getattr(spec, k) == getattr(default, k) and found.get(k) is not None
    ]
    labelled = spec.labelled or any(k in LABELS for k in keys)
    return replace(spec, **{k: found[k] for k in keys}, labelled=labelled)


def _history(found: Mapping[str, Any]) -> dict[str, Any]:
    """Labels of a checkpoint that `resafe train` or `resafe repair` wrote: fine-tuned, and by what it was mitigated."""
    if "verb" not in found:
        return {}
    steps = [m["name"] for part in (found.get("before") or {}, found) for m in part.get("mitigations", [])]
    return {"attack": "fine-tuning", "mitigation": "+".join(steps) or "none", "cost": costs(found), "lineage": _lineage(found)}


def _lineage(found: Mapping[str, Any]) -> str:
    """What a checkpoint was made from and how, its training seed apart: fine-tunes that differ in it are no repetitions."""
    made = [found.get(k) for k in ("verb", "model", "settings", "mitigations")]
    data = (found.get("data") or {}).get("sha256")
    return digest([made, data, _lineage(found["before"]) if found.get("before") else None])


def costs(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What a manifest and those before it say that training and repairing took, each kind added up."""
    out: dict[str, dict[str, float]] = costs(found["before"]) if found.get("before") else {}
    if found.get("usage"):
        out[found["verb"]] = added(out.get(found["verb"], {}), found["usage"])
    return out


def _labelled(spec: TargetSpec, labels: Mapping[str, Any]) -> TargetSpec:
    for key in labels:
        if key not in LABELS:
            raise ResafeError(f"unknown label '{key}' of target {spec.name}. {suggest(key, LABELS)}")
    return replace(spec, **labels, labelled=True)


def _told_apart(spec: TargetSpec, others: Sequence[TargetSpec]) -> TargetSpec:
    """Without its training seed where another fine-tune of the same labels was made from something else."""
    alike = {o.lineage for o in others if (o.attack, o.mitigation) == (spec.attack, spec.mitigation)}
    return replace(spec, seed=None) if len(alike) > 1 else spec


def _longer(spec: TargetSpec) -> TargetSpec:
    """Two folders of the same name are told apart by their parents."""
    folder = spec.folder
    return (
        spec
        if folder is None or spec.name != folder.absolute().name
        else replace(spec, name="/".join(folder.absolute().parts[-2:]))
    )
