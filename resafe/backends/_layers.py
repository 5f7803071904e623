"""Layers of a cache that write new columns in place: transformers' own copy all that they hold for every token (`torch.cat`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

SPARE = 64  # columns for which room is made whenever all is copied anyway


class FullLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Attention to every column.

    `keys` and `values` (rows, heads, columns, size) are the first columns of tensors with room for `spare` more. What such room
    contains is arbitrary: nobody may read a column before it is written.
    """

    spare = 0
    kept: slice = slice(None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns. Returns what these may attend to: all that was held, and themselves."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held: Any = (self.keys, self.values)
        room = SPARE if held[0].numel() else 0  # what was only read is copied when it is joined to others
        fresh, enough = key_states.shape[2], self.spare >= key_states.shape[2]
        keys, values = (_extended(old, new, enough, room) for old, new in zip(held, (key_states, value_states)))
        self.spare = self.spare - fresh if enough else room
        self.keys, self.values = keys[:, :, self.kept], values[:, :, self.kept]
        return keys, values


class SlidingLayer(FullLayer, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """Attention to a window; holds its last columns but one, and counts all that it has seen."""

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.kept = slice(1 - sliding_window, None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns, and let go of those that have left the window."""
        self.cumulative_length += key_states.shape[2]
        return super().update(key_states, value_states, *args, **kwargs)


def in_place(layer: Any) -> Any:
    """A new layer that does what `layer` does, an empty one of transformers' two kinds."""
    return SlidingLayer(layer.sliding_window) if layer.is_sliding else FullLayer()  # type: ignore[no-untyped-call]


def roomy(like: Tensor, rows: int, columns: int, room: int) -> Tensor:
    """A tensor of that many rows and columns, of which nothing is written yet, with room for more columns behind it."""
    return like.new_empty((rows, like.shape[1], columns + room, like.shape[3]))[:, :, :columns]


def _extended(held: Tensor, fresh: Tensor, enough: bool, room: int) -> Tensor:
    """`held` and `fresh`, in the room behind `held` if there is enough, else in a copy with `room`."""
    before = held.shape[2] if held.numel() else 0
    rows, heads, columns, size = fresh.shape
    if enough:
        out = held.as_strided((rows, heads, before + columns, size), held.stride(), held.storage_offset())
    else:
        out = roomy(fresh, rows, before + columns, room)
        if before:
            out[:, :, :before] = held
    out[:, :, before:] = fresh
    return out
