"""A fine-tuned model and the aligned one that it came from, tensor beside tensor, ready for a rule that edits weights.

What every such rule would otherwise have to decide again:

- Tensors are joined by name; tied embeddings are one tensor and are edited once. Where only one side is tied, its head is
  its embedding, and the result has a head of its own.
- A vocabulary that grew: rows that both have are edited, added rows stay as trained.
- Tensors that only the fine-tuned model has, and integer or boolean buffers, stay as they are.
- Refused: missing tensors, experts stacked in one model and stored one by one in the other, other shapes, a smaller vocabulary, other tokenizers, NaN or infinity, quantised weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.weights._parts import Part
from resafe.weights._progress import Progress
from resafe.weights._shards import stored, wide
from resafe.weights.checkpoint import Checkpoint, is_vocabulary
from resafe.weights.names import check_tokenizers, counterparts

if TYPE_CHECKING:
    from torch import Tensor

# Constants that older checkpoints store and newer ones compute.
COMPUTED = re.compile(r"(\.attn\.(masked_)?bias|rotary_emb\.inv_freq)$")
# The experts of a layer as one tensor, and one by one.
STACKED = re.compile(r"\.experts\.[a-z_]+$")
SINGLE = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Twin:
    """One tensor of the result: its name, and what the two models call theirs (`aligned` None: nothing to edit toward).

    `rows` (first, last + 1) are those that a rule is given, where it is given a block; None: all.
    """

    name: str
    tuned: str
    aligned: str | None
    vocabulary: bool = False
    rows: tuple[int, int] | None = None


Rule = Callable[[Twin, "Tensor", "Tensor"], "Tensor"]  # (twin, W_f, W_a) -> W; wide floats, same shape, not in place


class Pair:
    """Two checkpoints that fit together. Raises ResafeError, before any weight is read, when they do not."""

    def __init__(self, tuned: Checkpoint, aligned: Checkpoint, log: Callable[[str], None] = lambda _: None) -> None:
        self.tuned, self.aligned = tuned.plain(), aligned.plain()
        self.config: dict[str, Any] = {}  # entries of config.json that the result needs changed
        check_tokenizers(tuned.folder, aligned.folder)
        self._log = log
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
            _check_experts(tuned, aligned)
            raise ResafeError(
                f"{tuned.folder} lacks {len(lost)} tensors of {aligned.folder}: {some(lost)}. Is this the model it was tuned from?"
            )
        if alone := [t.name for t in twins if t.aligned is None]:
            log(f"kept as trained, since the aligned model has no such tensor: {some(alone)} ({len(alone)} in all)")
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

    def edit(self, rule: Rule, blocks: bool = False) -> list[Part]:
        """Every tensor of the result, in the dtype of the fine-tuned model, with `rule` applied where both models have it.

        Nothing is read before a part is computed. With `blocks` the rule is given some rows at a time (`Twin.rows`) and runs in
        several threads: for rules that treat every number by itself. Says through the pair's `log` how far the parts are.
        """
        done = Progress(self._log, sum(self.tuned.nbytes(t.tuned) for t in self.twins))
        return [self._part(twin, rule, blocks, done) for twin in self.twins]

    def _part(self, twin: Twin, rule: Rule, blocks: bool, done: Progress) -> Part:
        tuned = self.tuned
        kept = twin.aligned is None or not tuned.floating(twin.tuned)

        def compute(first: int, last: int) -> Tensor:
            value = tuned.finite(twin.tuned, first, last) if kept else self._edited(twin, rule, first, last, blocks)
            done.add(value.nbytes)
            return value

        return Part(twin.name, tuned.dtype(twin.tuned), tuned.shape(twin.tuned), compute, whole=not (blocks or kept))

    def _edited(self, twin: Twin, rule: Rule, first: int, last: int, block: bool) -> Tensor:
        import torch

        there = str(twin.aligned)
        if not self.aligned.floating(there):
            raise ResafeError(f"tensor {there} in {self.aligned.folder} is {self.aligned.dtype(there)}, not floating point.")
        common = min(last, self.aligned.height(there))
        if common <= first:  # a block of added tokens
            return self.tuned.finite(twin.tuned, first, last)
        # What treats every number by itself hands NaN and infinity on: it is enough to look at the result.
        read = Checkpoint.tensor if block and common == last else Checkpoint.finite
        tuned = read(self.tuned, twin.tuned, first, last)
        kind = tuned.dtype
        added = tuned[common - first :] if common < last else None
        ours = wide(tuned if added is None else tuned[: common - first])
        del tuned  # the stored values would stay in memory beside the widened ones
        theirs = wide(read(self.aligned, there, first, common))
        if ours.dtype != theirs.dtype:
            ours, theirs = ours.double(), theirs.double()
        edited = rule(replace(twin, rows=(first, common)) if block else twin, ours, theirs)
        del ours, theirs
        try:
            edited = stored(edited, kind, twin.name)
        except ResafeError:
            for model, name in ((self.tuned, twin.tuned), (self.aligned, there)):
                model.finite(name, first, common)  # says so, if it came from there
            raise
        return edited if added is None else torch.cat([edited, added])


def some(names: list[str]) -> str:
    """The first three."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _check_experts(one: Checkpoint, other: Checkpoint) -> None:
    """Refuse two layouts of the same experts."""
    for stacked, single in ((one, other), (other, one)):
        if _any(STACKED, stacked.names()) and _any(SINGLE, single.names()):
            raise ResafeError(
                f"{stacked.folder} stores its experts stacked and {single.folder} one by one: load one of them with transformers and save "
                "it again as the other is (save_original_format)."
            )


def _any(pattern: re.Pattern[str], names: Iterable[str]) -> bool:
    return any(pattern.search(name) for name in names)
