"""A checkpoint that is still to be computed: its tensors' names, dtypes and shapes, and how to compute them block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Union

from resafe.weights._shards import DTYPES, Shards, height

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 512 << 10  # bytes of a block: its float32 copies stay in a core's cache, and in memory that the allocator keeps between blocks


@dataclass(frozen=True)
class Part:
    """One tensor of a result. `compute(first, last)` gives its rows first..last - 1; `dtype` is the format's own name (F32, BF16, ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    compute: Callable[[int, int], Tensor]
    whole: bool = True  # computed in one piece, in the thread that asks: what needs a whole matrix, and uses all cores itself

    @property
    def nbytes(self) -> int:
        """Size of the values, in bytes."""
        return prod(self.shape) * item_size(self.dtype)

    def value(self) -> Tensor:
        """All of it, in one piece."""
        return self.compute(0, height(self.shape))

    def blocks(self) -> list[tuple[int, int]]:
        """Ranges of rows, each about BLOCK bytes; one range for a `whole` part."""
        rows = height(self.shape)
        if self.whole or not self.nbytes:
            return [(0, rows)]
        step = max(1, BLOCK * rows // self.nbytes)
        return [(first, min(rows, first + step)) for first in range(0, rows, step)]


Item = Union[Part, "tuple[str, Tensor]"]


def item_size(dtype: str) -> int:
    """Bytes of one value."""
    import torch

    kind: torch.dtype = getattr(torch, DTYPES[dtype])
    return kind.itemsize


def parts(items: Iterable[Item]) -> Iterator[Part]:
    """`items` as parts; a (name, tensor) pair is a part that is computed already."""
    for item in items:
        yield item if isinstance(item, Part) else _made(*item)


def copied(source: Shards, name: str) -> Part:
    """A tensor of `source` as it is. Raises ResafeError, when it is read, for NaN and infinity."""
    return Part(name, source.dtype(name), source.shape(name), lambda first, last: source.finite(name, first, last), whole=False)


def _made(name: str, tensor: Tensor) -> Part:
    kinds = {torch_name: ours for ours, torch_name in DTYPES.items()}
    return Part(name, kinds[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), lambda _first, _last: tensor)
