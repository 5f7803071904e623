"""Where fine-tuning moved the weights: size, rank and direction of every weight's change, one tensor in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resafe.errors import ResafeError
from resafe.models import base_of, is_adapter
from resafe.weights._pieces import changed, stored_pieces
from resafe.weights._shards import wide
from resafe.weights.alignment import Alignment
from resafe.weights.checkpoint import Checkpoint
from resafe.weights.lora import adapter_of
from resafe.weights.pair import Pair
from resafe.weights.subspace import EXACT, cosine, frobenius

if TYPE_CHECKING:
    from torch import Tensor

LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Change:
    """One weight's change D = W_tuned - W_aligned."""

    name: str
    norm: float  # ||D||_F
    relative: float  # ||D||_F / ||W_aligned||_F; 1 where W_aligned was zero and is no more
    rank: float | None  # stable rank ||D||_F^2 / ||D||_2^2; None for vectors
    cosine: float | None  # of D and V = W_aligned - W_base, where both are given; negative: away from alignment

    @property
    def layer(self) -> int | None:
        """The number of its block, None outside of the blocks."""
        found = LAYER.search(self.name)
        return int(found[1]) if found else None

    @property
    def module(self) -> str:
        """Its name within a block, or the whole name."""
        return LAYER.split(self.name, maxsplit=1)[-1].removesuffix(".weight")


def diff(aligned: Path, tuned: Path, base: Path | None = None, log: Callable[[str], None] = lambda _: None) -> list[Change]:
    """The change of every floating-point weight, by name. `tuned` may be a LoRA adapter of `aligned`.

    Raises ResafeError for models that do not fit together.
    """
    directions = Alignment(aligned, base) if base else None
    found = []
    for name, there, d, w in _adapter(aligned, tuned) if is_adapter(tuned) else _checkpoint(aligned, tuned, log):
        v = directions.direction(there) if directions and d.ndim == 2 and directions.of_one_shape(there) else None
        if v is not None and directions and directions.turned(there):
            v = v.T
        norm = frobenius(d)
        at = cosine(d, v.to(d.dtype)) if v is not None and v.shape == d.shape and norm > 0 else None
        size = frobenius(w)
        found.append(Change(name, norm, norm / size if size else float(norm > 0), stable_rank(d) if d.ndim == 2 and norm > 0 else None, at))
    return found


def _checkpoint(aligned: Path, tuned: Path, log: Callable[[str], None]) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    pair = Pair(Checkpoint(tuned), Checkpoint(aligned), log)
    for twin in pair.twins:
        if twin.aligned is None or not pair.tuned.floating(twin.tuned):
            continue
        ours, theirs = wide(pair.tuned.finite(twin.tuned)), wide(pair.aligned.finite(twin.aligned))
        rows = len(theirs) if theirs.ndim else None
        yield twin.name, twin.aligned, (ours[:rows] if rows else ours) - theirs, theirs


def _adapter(aligned: Path, tuned: Path) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    model = Checkpoint(aligned)
    if model.quantised:
        raise ResafeError(f"{aligned} is quantised: name the unquantised model that {base_of(tuned)} was made from.")
    adapter = adapter_of(tuned, aligned)
    found, heads = stored_pieces(model, adapter)
    places = [(name, name, each) for name, each in found.items()] + [(name, source, [piece]) for name, (source, piece) in heads.items()]
    for name, there, each in sorted(places, key=lambda p: p[0]):
        w = wide(model.finite(there))
        yield each[0].module.weight if each[0].module.vocabulary else name, there, changed(model, adapter, each, w), w


def stable_rank(d: Tensor, rounds: int = 100) -> float:
    """||D||_F^2 / ||D||_2^2, between 1 and the rank; of a large matrix the largest singular value by power iteration."""
    import torch

    if min(d.shape) <= EXACT:
        largest = float(torch.linalg.matrix_norm(d, 2))
    else:
        x = torch.randn(d.shape[1], generator=torch.Generator().manual_seed(0), dtype=d.dtype)
        for _ in range(rounds):
            x = d.T @ (d @ x)
            x = x / x.norm().clamp_min(1e-30)
        largest = float((d @ x).norm())
    return max(1.0, frobenius(d) ** 2 / max(largest, 1e-30) ** 2)
