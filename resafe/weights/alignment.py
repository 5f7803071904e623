"""The direction of alignment, weight by weight: V = W_aligned - W_base, joined by name to whatever is to be repaired."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from resafe.errors import ResafeError
from resafe.weights._pieces import CONV1D, STACKED_IN_OUT
from resafe.weights._shards import wide
from resafe.weights.checkpoint import POSITIONS, Checkpoint, is_vocabulary
from resafe.weights.names import check_tokenizers, counterparts
from resafe.weights.pair import COMPUTED, some

if TYPE_CHECKING:
    from torch import Tensor


NOT_LINEAR = ("bias", "A_log")  # 2-D all the same: the biases of stacked experts, the states of state-space models
# Experts of a layer in one tensor, (expert, ., .), and which of its sides is the size of the hidden state.
STACKED = re.compile(r"\.experts\.|\.(in|out)put_linear\.weight$")
FROM_HIDDEN = re.compile(r"\.((gate|up|gate_up)_proj|w1|w3)(\.weight)?$|\.input_linear\.weight$")
TO_HIDDEN = re.compile(r"\.(down_proj|w2)(\.weight)?$|\.output_linear\.weight$")


class Alignment:
    """Aligned model and the base that it was aligned from. Raises ResafeError where they do not fit or their linear weights do not differ."""

    def __init__(self, aligned: Path, base: Path) -> None:
        self.aligned, self.base = Checkpoint(aligned), Checkpoint(base)
        for model, option in ((self.aligned, "--aligned"), (self.base, "--base")):
            if model.quantised:
                raise ResafeError(f"{model.folder} is quantised ({model.quantised}), which hides the direction of alignment: name the unquantised model that it was made from with {option}.")
        check_tokenizers(aligned, base)
        self._there = counterparts(self.aligned.names(), self.base)
        if aligned.resolve() == base.resolve():
            raise ResafeError(f"{aligned} is given as the aligned model and as its base: name the model before alignment with --base.")
        if lost := [n for n in self.aligned.names() if n not in self._there and self.aligned.floating(n) and not COMPUTED.search(n)]:
            raise ResafeError(f"{base} lacks {len(lost)} tensors of {aligned}: {some(lost)}. Is it the model that this one was aligned from?")
        if extra := [n for n in self.base.names() if n not in self._there.values() and not COMPUTED.search(n) and not is_vocabulary(n)]:
            raise ResafeError(f"{base} has {len(extra)} tensors that {aligned} lacks: {some(extra)}. Is it the model that this one was aligned from?")
        if all(self.direction(n) is None for n in self.matrices()):  # as a rule the first of them differs
            raise ResafeError(f"{aligned} and {base} have the same linear weights: name the model before alignment with --base.")

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
        return STACKED.search(name) is not None and len(self.aligned.shape(name)) == 3

    def of_one_shape(self, name: str) -> bool:
        """Whether both models have the weight, in one shape: a vocabulary may have grown."""
        return name in self._there and self.aligned.shape(name) == self.base.shape(self._there[name])

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
        turned = self._in_out(name)
        return {f"[{i}]": matrix.T if turned else matrix for i, matrix in enumerate(value)}

    def _in_out(self, name: str) -> bool:
        """Whether the experts of a stack are stored as (in, out): by the side that has the hidden state's size, else by model type."""
        config = self.aligned.config
        hidden = config.get("hidden_size") or (config.get("text_config") or {}).get("hidden_size")
        _, first, last = self.aligned.shape(name)
        if (first == hidden) != (last == hidden):
            if FROM_HIDDEN.search(name):
                return bool(first == hidden)
            if TO_HIDDEN.search(name):
                return bool(last == hidden)
        return config.get("model_type") in STACKED_IN_OUT

    def directions(self, name: str) -> dict[str, Tensor]:
        """V of each of the weight's matrices that alignment moved, (out, in), by what `each` calls them."""
        v = self.direction(name)
        if v is None:
            return {}
        return {k: m for k, m in self.each(name, v).items() if bool(m.any())} if self.stacked(name) else {"": v}

    def turned(self, name: str) -> bool:
        """Whether the weight is a matrix stored as (in, out)."""
        return self.aligned.config.get("model_type") in CONV1D and len(self.aligned.shape(name)) == 2 and not is_vocabulary(name)
