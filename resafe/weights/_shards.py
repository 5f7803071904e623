"""Named tensors in one or more safetensors files: headers are checked at once, values are read when asked for, whole or by rows.

Values are read with `pread` into memory of their own. A memory map would be slower here (a fault per page), and its pages
would count as resident until the file is closed, adding up to the whole checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError, suggest

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("F64", "F32", "F16", "BF16")  # 8-bit floats mean nothing without their scales: see Checkpoint.quantised
# The format's names of the dtypes that torch has, in the format's own order (its writer puts the last first), and torch's.
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "I16": "int16", "U16": "uint16",
    "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "C64": "complex64", "F64": "float64",
    "I64": "int64", "U64": "uint64",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where a tensor is stored (`start`, `stop`: bytes of `file`), and its header; `dtype` is the format's own name (F32, BF16, ...).

    `stamp` says which file that was when its header was read: a run that lasts hours must not mix two models.
    """

    file: Path
    stamp: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@contextmanager
def undamaged(file: Path) -> Iterator[None]:
    """Every way in which a file can turn out to be damaged becomes one ResafeError."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError:
        raise ResafeError(f"weights file {file} is missing: copy or download it again.") from None
    except (SafetensorError, OSError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ResafeError(f"weights file {file} is damaged ({reason}): copy or download it again.") from None


def _entries(file: Path) -> dict[str, Entry]:
    from safetensors import safe_open

    with undamaged(file):
        with safe_open(str(file), framework="pt", device="cpu"):
            pass  # opening checks the header, its offsets and the file's size
        with file.open("rb") as stream:
            stamp = _stamp(stream.fileno())
            size = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    first = 8 + size
    return {
        name: Entry(file, stamp, e["dtype"], tuple(e["shape"]), first + e["data_offsets"][0], first + e["data_offsets"][1])
        for name, e in header.items()
    }


def _stamp(fd: int) -> tuple[int, ...]:
    s = os.fstat(fd)
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns


def height(shape: tuple[int, ...]) -> int:
    """Rows of a tensor; a scalar has one."""
    return shape[0] if shape else 1


def as_bytes(value: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, which they share."""
    import torch

    return value.reshape(-1).view(torch.uint8)


def _read(entry: Entry, first: int, last: int) -> Tensor:
    """Rows first..last - 1 of a stored tensor."""
    import torch

    if entry.dtype not in DTYPES:
        raise ResafeError(f"{entry.file} holds tensors of type {entry.dtype}, which cannot be edited: use the unquantised checkpoint.")
    shape = (last - first, *entry.shape[1:]) if entry.shape else ()
    value = torch.empty(shape, dtype=getattr(torch, DTYPES[entry.dtype]))
    if not value.numel():
        return value
    row = (entry.stop - entry.start) // height(entry.shape)
    memory, at, done = as_bytes(value).numpy().data, entry.start + first * row, 0
    with undamaged(entry.file):
        fd = os.open(entry.file, os.O_RDONLY)
        try:
            if _stamp(fd) != entry.stamp:
                raise ResafeError(f"weights file {entry.file} was changed while it was being used: run the same command again.")
            while done < len(memory):
                got = os.preadv(fd, [memory[done:]], at + done)
                if got == 0:
                    raise EOFError(f"it ends at byte {at + done}")
                done += got
        finally:
            os.close(fd)
    return value


class Shards:
    """A set of named tensors, looked up by name wherever they lie."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._entries: dict[str, Entry] = {}
        for file in files:
            fresh = _entries(file)
            if twice := sorted(self._entries.keys() & fresh.keys()):
                other = self._entries[twice[0]].file.name
                raise ResafeError(f"tensor {twice[0]} is in both {other} and {file}: save the model again.")
            self._entries.update(fresh)

    def names(self) -> list[str]:
        """All names, sorted: the order in the files means nothing."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise ResafeError(f"no tensor named {name}. {suggest(name, self._entries)}")
        return self._entries[name]

    def file(self, name: str) -> Path:
        """The file that holds `name`."""
        return self._entry(name).file

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, from the header."""
        return self._entry(name).shape

    def height(self, name: str) -> int:
        """Number of rows, from the header; a scalar has one."""
        return height(self.shape(name))

    def dtype(self, name: str) -> str:
        """The safetensors name of the dtype, from the header."""
        return self._entry(name).dtype

    def floating(self, name: str) -> bool:
        """Whether arithmetic on `name` makes sense: a plain 16 to 64 bit float, not an index, a mask or packed bits."""
        return self.dtype(name) in FLOATS

    def nbytes(self, name: str) -> int:
        """Size of the values, in bytes."""
        entry = self._entry(name)
        return entry.stop - entry.start

    def tensor(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """The values, or those of rows first..last - 1, in memory only while they are referred to."""
        entry = self._entry(name)
        return _read(entry, first, self.height(name) if last is None else last)

    def finite(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """`tensor`, refused where it holds NaN or infinity: they would spread to whatever is computed from it."""
        value = self.tensor(name, first, last)
        if self.floating(name) and not is_finite(value):
            raise ResafeError(
                f"tensor {name} in {self.file(name)} holds NaN or infinity: the training run diverged; use an earlier checkpoint."
            )
        return value


def is_finite(value: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    # One NaN or infinity makes a sum infinite or NaN, which costs one pass; only a sum that overflows needs the second look.
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def wide(value: Tensor) -> Tensor:
    """`value` in the precision in which weights are computed: float32, or float64 where it is stored so."""
    import torch

    return value if value.dtype == torch.float64 else value.float()


def stored(value: Tensor, dtype: Any, name: str) -> Tensor:
    """`value` in the dtype that it is written in. Raises ResafeError where that, or the arithmetic before, left NaN or infinity."""
    found = value.to(dtype)
    if not is_finite(found):
        raise ResafeError(f"tensor {name} would hold NaN or infinity as {str(dtype).removeprefix('torch.')}: use a smaller strength, or a model in a wider dtype.")
    return found
