"""A fine-tuned model and the aligned one that it came from, tensor beside tensor, ready for a rule that edits weights.

What every such rule would otherwise have to decide again:

- Tensors are joined by name; tied embeddings are one tensor and are edited once. Where only one side is tied, its head is
  its embedding, and the result has a head of its own.
- A vocabulary that grew: rows that both have are edited, added rows stay as trained.
- Tensors that only the fine-tuned model has, and integer or boolean buffers, stay as they are.
- Refused: missing tensors, other shapes, a smaller vocabulary, other tokenizers, NaN or infinity, quantised weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.weights._shards import wide
from resafe.weights.checkpoint import Checkpoint, is_vocabulary
from resafe.weights.names import check_tokenizers, counterparts

if TYPE_CHECKING:
    from torch import Tensor

# Constants that older checkpoints store and newer ones compute.
COMPUTED = re.compile(r"(\.attn\.(masked_)?bias|rotary_emb\.inv_freq)$")


@dataclass(frozen=True)
class Twin:
    """One tensor of the result: its name, and what the two models call theirs (`aligned` None: nothing to edit toward)."""

    name: str
    tuned: str
    aligned: str | None
    vocabulary: bool = False


Rule = Callable[[Twin, "Tensor", "Tensor"], "Tensor"]  # (twin, W_f, W_a) -> W; wide floats, same shape, not in place


class Pair:
    """Two checkpoints that fit together. Raises ResafeError, before any weight is read, when they do not."""

    def __init__(self, tuned: Checkpoint, aligned: Checkpoint, log: Callable[[str], None] = lambda _: None) -> None:
        self.tuned, self.aligned = tuned.plain(), aligned.plain()
        self.config: dict[str, Any] = {}  # entries of config.json that the result needs changed
        check_tokenizers(tuned.folder, aligned.folder)
        self.twins = self._join(log)
        for twin in self.twins:
            self._check(twin)

    def _join(self, log: Callable[[str], None]) -> list[Twin]:
        tuned, aligned = self.tuned, self.aligned
        there = counterparts(tuned.names(), aligned)
        twins = [Twin(n, n, there.get(n), is_vocabulary(n)) for n in tuned.names()]
        unmatched = set(aligned.names()) - set(there.values())
        if tuned.tied and aligned.head and not aligned.tied:  # the result needs a head of its own
            self.config = {"tie_word_embeddings": False}
            if tuned.head is None and tuned.embedding:
                twins.append(Twin(aligned.head, tuned.embedding, aligned.head, True))
        lost = sorted(n for n in unmatched - {aligned.head} if not COMPUTED.search(n))
        if lost:
            raise ResafeError(
                f"{tuned.folder} lacks {len(lost)} tensors of {aligned.folder}: {_some(lost)}. Is this the model it was tuned from?"
            )
        if alone := [t.name for t in twins if t.aligned is None]:
            log(f"kept as trained, since the aligned model has no such tensor: {_some(alone)} ({len(alone)} in all)")
        return twins

    def _check(self, twin: Twin) -> None:
        if twin.aligned is None:
            return
        ours, theirs = self.tuned.shape(twin.tuned), self.aligned.shape(twin.aligned)
        if ours == theirs:
            return
        if twin.vocabulary and ours[1:] == theirs[1:]:
            if ours[0] > theirs[0]:
                return
            raise ResafeError(
                f"{self.tuned.folder} has {ours[0]} rows in {twin.name} and the aligned model {theirs[0]}: its vocabulary shrank, "
                "so ids may mean other tokens. Fine-tune without resizing the embedding."
            )
        raise ResafeError(
            f"tensor {twin.name} has shape {list(ours)} in {self.tuned.folder} and {list(theirs)} in {self.aligned.folder}: "
            "these are different architectures."
        )

    def edit(self, rule: Rule) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the result, in the dtype of the fine-tuned model, with `rule` applied where both models have it."""
        for twin in self.twins:
            yield twin.name, self._edited(twin, rule)

    def _edited(self, twin: Twin, rule: Rule) -> Tensor:
        import torch

        tuned = self.tuned.finite(twin.tuned)
        if twin.aligned is None or not self.tuned.floating(twin.tuned):
            return tuned
        aligned = self.aligned.finite(twin.aligned)
        if not self.aligned.floating(twin.aligned):
            raise ResafeError(f"tensor {twin.aligned} in {self.aligned.folder} is {aligned.dtype}, not floating point.")
        rows = aligned.shape[0] if tuned.shape != aligned.shape else None
        ours, theirs = wide(tuned if rows is None else tuned[:rows]), wide(aligned)
        if ours.dtype != theirs.dtype:
            ours, theirs = ours.double(), theirs.double()
        edited = rule(twin, ours, theirs).to(tuned.dtype)
        return edited if rows is None else torch.cat([edited, tuned[rows:]])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
