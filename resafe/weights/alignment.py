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
NOT_LINEAR = ("bias", "A_log")  # 2-D all the same: the biases of stacked experts, the states of state-space models
STACKED_IN_OUT = ("gpt_oss", "aria", "aria_text", "llama4", "llama4_text")  # model types whose stacked experts are (expert, in, out)


class Alignment:
    """Aligned model and the base that it was aligned from. Raises ResafeError where they do not fit or do not differ."""

    def __init__(self, aligned: Path, base: Path) -> None:
        self.aligned, self.base = Checkpoint(aligned).plain(), Checkpoint(base).plain()
        check_tokenizers(aligned, base)
        self._there = counterparts(self.aligned.names(), self.base)
        if aligned.resolve() == base.resolve():
            raise ResafeError(f"{aligned} is given as the aligned model and as its base: name the model before alignment with --base.")

    def matrices(self) -> list[str]:
        """Names (of the aligned model) of the linear weights that both models have; neither embeddings nor heads.

        A stack of experts, (expert, ., .), is one name.
        """
        return [n for n in self.aligned.names() if n in self._there and self._linear(n)]

    def _linear(self, name: str) -> bool:
        known = self.aligned.floating(name) and not is_vocabulary(name) and not name.endswith((*POSITIONS, *NOT_LINEAR))
        return known and (len(self.aligned.shape(name)) == 2 or self.stacked(name))

    def stacked(self, name: str) -> bool:
        """Whether the weight is a stack of experts' matrices."""
        return ".experts." in name and len(self.aligned.shape(name)) == 3

    def direction(self, name: str) -> Tensor | None:
        """V of one weight, (out, in) in wide floats, also where it is stored turned (GPT-2); None where alignment left it as it was.

        Of a stack of experts it is laid out as the stack; see `directions`.

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

    def each(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """`value`, laid out as the weight `name` is stored, as matrices (out, in), which are views: one, called "", or the experts of a stack."""
        if not self.stacked(name):
            return {"": value.T if self.turned(name) else value}
        turned = self.aligned.config.get("model_type") in STACKED_IN_OUT
        return {f"[{i}]": matrix.T if turned else matrix for i, matrix in enumerate(value)}

    def directions(self, name: str) -> dict[str, Tensor]:
        """V of each of the weight's matrices that alignment moved, (out, in), by what `each` calls them."""
        v = self.direction(name)
        if v is None:
            return {}
        return {k: m for k, m in self.each(name, v).items() if bool(m.any())} if self.stacked(name) else {"": v}

    def turned(self, name: str) -> bool:
        """Whether the weight is a matrix stored as (in, out)."""
        return self.aligned.config.get("model_type") in CONV1D and len(self.aligned.shape(name)) == 2 and not is_vocabulary(name)
