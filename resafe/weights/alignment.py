"""The direction of alignment, weight by weight: V = W_aligned - W_base, joined by name to whatever is to be repaired."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from resafe.errors import ResafeError
from resafe.weights._merge import CONV1D
from resafe.weights._shards import wide
from resafe.weights.checkpoint import Checkpoint, is_vocabulary
from resafe.weights.names import check_tokenizers, counterparts

if TYPE_CHECKING:
    from torch import Tensor


POSITIONS = ("wpe.weight", "embed_positions.weight", "position_embeddings.weight")


class Alignment:
    """Aligned model and the base that it was aligned from. Raises ResafeError where they do not fit or do not differ."""

    def __init__(self, aligned: Path, base: Path) -> None:
        self.aligned, self.base = Checkpoint(aligned).plain(), Checkpoint(base).plain()
        check_tokenizers(aligned, base)
        self._there = counterparts(self.aligned.names(), self.base)
        if aligned.resolve() == base.resolve():
            raise ResafeError(f"{aligned} is given as the aligned model and as its base: name the model before alignment with --base.")

    def matrices(self) -> list[str]:
        """Names (of the aligned model) of the linear weights that both models have; neither embeddings nor heads."""
        return [n for n in self.aligned.names() if n in self._there and len(self.aligned.shape(n)) == 2 and self._linear(n)]

    def _linear(self, name: str) -> bool:
        return self.aligned.floating(name) and not is_vocabulary(name) and not name.endswith(POSITIONS)

    def direction(self, name: str) -> Tensor | None:
        """V of one weight, (out, in) in wide floats, also where it is stored turned (GPT-2); None where alignment left it as it was.

        Raises ResafeError for another shape and for NaN.
        """
        if name not in self._there:
            return None
        ours, theirs = wide(self.aligned.finite(name)), wide(self.base.finite(self._there[name]))
        if ours.shape != theirs.shape:
            raise ResafeError(f"tensor {name} has shape {list(ours.shape)} in {self.aligned.folder} and {list(theirs.shape)} in {self.base.folder}: these are different architectures.")
        v = ours.to(theirs.dtype) - theirs if theirs.element_size() > ours.element_size() else ours - theirs.to(ours.dtype)
        if not bool(v.any()):
            return None
        return v.T if self.turned(name) else v

    def turned(self, name: str) -> bool:
        """Whether the weight is stored as (in, out)."""
        return self.aligned.config.get("model_type") in CONV1D and len(self.aligned.shape(name)) == 2 and not is_vocabulary(name)
