"""Conversations as padded batches, with a mark on the positions that count.

A position counts where the token that it predicts was written by the assistant. So the last token of the question counts,
which is where a refusal is decided; the last token of the answer does not, and neither do the question itself and padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resafe import chat
from resafe.errors import ResafeError
from resafe.rows import Message, Row

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Token ids, attention mask and marks, each (rows, length); padded on the right."""

    ids: Tensor
    attention: Tensor
    counts: Tensor

    def to(self, device: Any) -> Batch:
        """The same on another device."""
        return Batch(self.ids.to(device), self.attention.to(device), self.counts.to(device))

    def rows(self) -> Iterator[Batch]:
        """One row at a time, without its padding."""
        for ids, attention, counts in zip(self.ids, self.attention, self.counts):
            n = int(attention.sum())
            yield Batch(ids[None, :n], attention[None, :n], counts[None, :n])


def answers(tokenizer: Any, rows: Sequence[Row], size: int = 8, max_length: int = 512) -> list[Batch]:
    """`rows` with their answers marked, `size` rows at a time, cut to `max_length` tokens.

    Raises ResafeError if no row has an answer within that length.
    """
    found = []
    for row in rows:
        encoded = chat.encode(tokenizer, row["messages"])
        counts = [*encoded.assistant[1:max_length], 0]
        if any(counts):
            found.append((encoded.ids[:max_length], counts))
    if not found:
        raise ResafeError(f"none of {len(rows)} rows has an answer within {max_length} tokens: give rows with answers, or a larger max_length.")
    return _padded(found, size, tokenizer.pad_token_id)


def prompts(tokenizer: Any, conversations: Sequence[Sequence[Message]], size: int = 8, max_length: int = 512) -> list[Batch]:
    """Conversations up to where the assistant starts; only the last token is marked. Long ones are cut on the left."""
    if not conversations:
        raise ResafeError("there are no prompts to look at.")
    found = []
    for conversation in conversations:
        ids = chat.next_turn_ids(tokenizer, conversation)[-max_length:]
        found.append((ids, [0] * (len(ids) - 1) + [1]))
    return _padded(found, size, tokenizer.pad_token_id)


def _padded(found: Sequence[tuple[list[int], list[int]]], size: int, pad: int) -> list[Batch]:
    import torch

    batches = []
    for start in range(0, len(found), size):
        part = found[start : start + size]
        longest = max(len(ids) for ids, _ in part)
        ids = torch.tensor([i + [pad] * (longest - len(i)) for i, _ in part])
        attention = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in part])
        counts = torch.tensor([c + [0] * (longest - len(c)) for _, c in part]).bool()
        batches.append(Batch(ids, attention, counts))
    return batches
