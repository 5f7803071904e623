"""Named tensors in one or more safetensors files: headers are checked at once, values are read one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError, suggest

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("F64", "F32", "F16", "BF16")  # 8-bit floats mean nothing without their scales: see Checkpoint.quantised


@dataclass(frozen=True)
class Entry:
    """Where a tensor is stored, and its header; `dtype` is the format's own name (F32, BF16, ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """`safe_open`, with every way in which a file can be damaged turned into one ResafeError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt", device="cpu") as handle:
            yield handle
    except FileNotFoundError:
        raise ResafeError(f"weights file {file} is missing: copy or download it again.") from None
    except (SafetensorError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ResafeError(f"weights file {file} is damaged ({reason}): copy or download it again.") from None


def _entries(file: Path) -> dict[str, Entry]:
    with opened(file) as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        return {name: Entry(file, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


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

    def dtype(self, name: str) -> str:
        """The safetensors name of the dtype, from the header."""
        return self._entry(name).dtype

    def floating(self, name: str) -> bool:
        """Whether arithmetic on `name` makes sense: a plain 16 to 64 bit float, not an index, a mask or packed bits."""
        return self.dtype(name) in FLOATS

    def tensor(self, name: str) -> Tensor:
        """The values, in memory only while they are referred to. Not for in-place arithmetic."""
        # Opened per tensor: pages of a file that stays open stay in memory, and would add up to the whole checkpoint.
        with opened(self.file(name)) as handle:
            value: Tensor = handle.get_tensor(name)
        return value

    def finite(self, name: str) -> Tensor:
        """`tensor`, refused where it holds NaN or infinity: they would spread to whatever is computed from it."""
        value = self.tensor(name)
        if self.floating(name) and not bool(value.isfinite().all()):
            raise ResafeError(
                f"tensor {name} in {self.file(name)} holds NaN or infinity: the training run diverged; use an earlier checkpoint."
            )
        return value


def wide(value: Tensor) -> Tensor:
    """`value` in the precision in which weights are computed: float32, or float64 where it is stored so."""
    import torch

    return value if value.dtype == torch.float64 else value.float()
