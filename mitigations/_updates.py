"""Judging and editing an update weight by weight, whether it is a LoRA adapter's s B A or a full checkpoint's W - W_aligned."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.files import write_json
from resafe.mitigation import Run
from resafe.models import base_of, is_adapter
from resafe.weights import adapter_of

if TYPE_CHECKING:
    from torch import Tensor

    from resafe.weights import Adapter, Twin
    from resafe.weights._pieces import Piece
    from resafe.weights.alignment import Alignment

EXPERT = re.compile(r"\[\d+\]$")  # after the name of a stack: one of its experts
Operator = Callable[["Tensor"], Any]  # V (out, in) -> something with apply(x); None: nothing is left


@dataclass(frozen=True)
class Decision:
    """One weight's score, and the cosine that it comes from."""

    name: str
    score: float
    cosine: float

    @property
    def facts(self) -> dict[str, Any]:
        """For the record beside the result."""
        return {"weight": self.name, "score": round(self.score, 6), "cosine": round(self.cosine, 6)}


def fingerprints(run: Run, name: str) -> tuple[Path, Path, Path]:
    """(tuned, aligned, base) folders. Raises ResafeError if one is not named."""
    if run.tuned is None or run.aligned is None or run.base is None:
        raise ResafeError(f"{name} needs three models: the fine-tuned one, --aligned and --base.")
    return run.tuned, run.aligned, run.base


def decide(run: Run, tuned: Path, aligned: Path, base: Path, operator: Operator, score: Callable[[Any, float], float]) -> list[Decision]:
    """The score of every updated weight that alignment moved, by name. Raises ResafeError if there is none."""
    from resafe.weights.alignment import Alignment

    alignment = Alignment(aligned, base)
    found = _of_adapter(alignment, tuned, operator, score) if is_adapter(tuned) else _of_checkpoint(run, alignment, tuned, operator, score)
    if not found:
        raise ResafeError(f"none of the weights that fine-tuning changed in {tuned} was moved by alignment: are {aligned} and {base} an aligned model and its base?")
    return found


def _of_adapter(alignment: Alignment, tuned: Path, operator: Operator, score: Callable[[Any, float], float]) -> list[Decision]:
    from resafe.weights.subspace import cosine

    adapter = adapter_of(tuned, alignment.aligned.folder)
    found = []
    for name, each in adapted(adapter, alignment).items():
        directions = alignment.directions(name)
        for piece in each:
            if (v := directions.get(piece.which)) is None:
                continue
            b, a = adapter.factors(piece.module)
            b, a = piece.b(b).to(v.dtype), piece.a(a).to(v.dtype)
            if (b.shape[0], a.shape[1]) != v.shape:
                raise ResafeError(f"{name} has shape {list(v.shape)} in {alignment.aligned.folder} and {[b.shape[0], a.shape[1]]} in {tuned}: the adapter is of another model.")
            made = operator(v)
            at = cosine(made.apply(b), b, a)
            found.append(Decision(name + piece.which, score(made, at), at))
    return found


def _of_checkpoint(run: Run, alignment: Alignment, tuned: Path, operator: Operator, score: Callable[[Any, float], float]) -> list[Decision]:
    from resafe.weights import Checkpoint, Pair, Progress, wide
    from resafe.weights.subspace import cosine

    pair = Pair(Checkpoint(tuned), alignment.aligned, run.log)
    names = set(alignment.matrices())
    twins = [(twin, str(twin.aligned)) for twin in pair.twins if twin.aligned in names]
    done = Progress(run.log, sum(pair.tuned.nbytes(twin.tuned) for twin, _ in twins))
    found = []
    for twin, there in twins:
        d = alignment.each(there, wide(pair.tuned.finite(twin.tuned)) - wide(pair.aligned.finite(there)))
        for which, v in alignment.directions(there).items():
            if bool(d[which].any()):
                made, x = operator(v), d[which].to(v.dtype)
                at = cosine(made.apply(x), x)
                found.append(Decision(twin.name + which, score(made, at), at))
        done.add(pair.tuned.nbytes(twin.tuned))
    return found


def apply_to_adapter(
    run: Run, tuned: Path, aligned: Path, base: Path, chosen: set[str], operator: Operator, file: str, about: Mapping[str, Any]
) -> Path:
    """B <- operator(V) B in the chosen modules; A, and all other modules, stay bit for bit."""
    from resafe.weights import wide, write_adapter
    from resafe.weights.alignment import Alignment

    alignment, adapter = Alignment(aligned, base), adapter_of(tuned, aligned)
    tensors = {name: adapter.finite(name) for name in adapter.names()}
    for name, each in adapted(adapter, alignment).items():
        if not chosen.intersection(name + piece.which for piece in each):
            continue
        directions = alignment.directions(name)
        for piece in each:
            if name + piece.which in chosen:
                v = directions[piece.which]
                b = piece.b(tensors[piece.module.b])
                b.copy_(edited(operator(v), wide(b).to(v.dtype)))
    config = {**adapter.config, "base_model_name_or_path": str(base_of(tuned).absolute())}
    return _recorded(write_adapter(tuned, run.output, config, tensors), file, about)


def apply_to_checkpoint(
    run: Run, tuned: Path, aligned: Path, base: Path, chosen: set[str], operator: Operator, file: str, about: Mapping[str, Any]
) -> Path:
    """W <- W_aligned + operator(V) (W - W_aligned) in the chosen weights (experts of a stack each by itself); everything else stays as fine-tuned."""
    from resafe.weights import Checkpoint, Pair, write_checkpoint
    from resafe.weights.alignment import Alignment

    alignment = Alignment(aligned, base)
    pair = Pair(Checkpoint(tuned), alignment.aligned, run.log)
    touched = {EXPERT.sub("", name) for name in chosen}

    def rule(twin: Twin, ours: Tensor, theirs: Tensor) -> Tensor:
        if twin.name not in touched:
            return ours
        there, result = str(twin.aligned), ours.clone()
        new, old, target = (alignment.each(there, value) for value in (ours, theirs, result))
        for which, v in alignment.directions(there).items():
            if twin.name + which in chosen:
                target[which].copy_(old[which] + edited(operator(v), (new[which] - old[which]).to(v.dtype)))
        return result

    return _recorded(write_checkpoint(tuned, run.output, pair.edit(rule), config=pair.config), file, about)


def edited(operator: Any, x: Tensor) -> Tensor:
    """operator x, or nothing at all."""
    import torch

    return torch.zeros_like(x) if operator is None else operator.apply(x)


def adapted(adapter: Adapter, alignment: Alignment) -> dict[str, list[Piece]]:
    """What the adapter changes of each linear weight of the aligned model, joined by name; embeddings are left out."""
    from resafe.weights._pieces import STACKED_IN_OUT, TURNED, stored_pieces

    matrices, kind = set(alignment.matrices()), alignment.aligned.config.get("model_type")
    found = {name: each for name, each in sorted(stored_pieces(alignment.aligned, adapter)[0].items()) if name in matrices}
    if kind in STACKED_IN_OUT and kind not in TURNED and any(piece.module.experts for each in found.values() for piece in each):
        raise ResafeError(f"{adapter.folder}: PEFT adapts the experts of {kind} from the side of their inputs, which cannot be projected: merge it into {alignment.aligned.folder} and repair the full checkpoint.")
    return found


def _recorded(folder: Path, file: str, about: Mapping[str, Any]) -> Path:
    write_json(folder / file, about)
    return folder
