"""A file of known size that several threads fill, in any order, and that is written in slabs: past the page cache if it is large.

Pages of the cache have to be found, and the inputs' are pushed out for them; on a virtual machine, whose memory the host may first
have to give back, a page costs several times the copy into it. A slab is memory that is used again and again.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from resafe.errors import ResafeError

if TYPE_CHECKING:
    from torch import Tensor

SLAB = 4 << 20  # bytes, a multiple of ALIGN
ALIGN = 4096  # what writing past the cache asks of places, lengths and memory
LARGE = 256 << 20  # bytes of a file that is written past the cache; a smaller one is more likely to be read again at once
FLUSH = 128 << 20  # bytes in the cache after which they are sent to the disk, so that it works while the rest is computed
DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


class Out:
    """`size` bytes at `file`, which is new. Slabs are written by `writer`, one at a time: file systems let one thread write to a file."""

    def __init__(self, file: Path, size: int, writer: ThreadPoolExecutor) -> None:
        self.file, self.size, self._writer = file, size, writer
        with self._writing():
            self._fd, self._direct = _opened(file, DIRECT if size >= LARGE else 0)
        self._slabs: dict[int, _Slab] = {}  # by number, those that are being filled
        self._free: list[_Slab] = []
        self._lock, self._turn = Lock(), Lock()
        self._sent: Future[None] | None = None
        self._unflushed = 0

    def put(self, data: Tensor, at: int) -> None:
        """Bytes (uint8, one dimension) for the place `at`; every byte of the file comes once. Raises ResafeError where the disk is full."""
        while len(data):
            number, start = divmod(at, SLAB)
            piece = data[: SLAB - start]
            slab = self._slab(number)
            slab.bytes[start : start + len(piece)] = piece
            with self._lock:
                slab.missing -= len(piece)
                full = self._slabs.pop(number) if slab.missing == 0 else None
            if full:
                self._send(number, full)
            data, at = data[len(piece) :], at + len(piece)

    def finish(self) -> None:
        """Wait until all is written. Raises ResafeError where it was not."""
        if self._sent:
            self._sent.result()
        if self._slabs:
            raise ValueError(f"{self.file.name} was not filled")
        if os.fstat(self._fd).st_size != self.size:
            with self._writing():
                os.ftruncate(self._fd, self.size)  # the last slab was rounded up

    def close(self) -> None:
        """Let go of the file, whatever became of it, once no thread writes to it any more."""
        os.close(self._fd)

    def _slab(self, number: int) -> _Slab:
        with self._lock:
            if number not in self._slabs:
                slab = self._free.pop() if self._free else _Slab()
                slab.missing = min(SLAB, self.size - number * SLAB)
                self._slabs[number] = slab
            return self._slabs[number]

    def _send(self, number: int, slab: _Slab) -> None:
        with self._turn:
            if self._sent:
                self._sent.result()
            self._sent = self._writer.submit(self._write, number, slab)

    def _write(self, number: int, slab: _Slab) -> None:
        at = number * SLAB
        length = min(SLAB, self.size - at)
        if self._direct:
            length = -(-length // ALIGN) * ALIGN
        data = memoryview(slab.memory)[:length]
        with self._writing():
            while data:
                done = self._written(data, at)
                data, at = data[done:], at + done
            self._unflushed += length
            if self._unflushed >= FLUSH and not self._direct:
                getattr(os, "fdatasync", os.fsync)(self._fd)  # macOS has only the latter
                self._unflushed = 0
        with self._lock:
            self._free.append(slab)

    def _written(self, data: memoryview, at: int) -> int:
        try:
            return os.pwrite(self._fd, data, at)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
        # The file system opens files for this but does not write them so, or wants more than ALIGN.
        fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~DIRECT)
        self._direct = 0
        return os.pwrite(self._fd, data, at)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResafeError(f"cannot write {self.file.parent}: {error.strerror}. Is the disk full?") from None


class _Slab:
    """Memory at the start of a page, and how many bytes it still waits for."""

    def __init__(self) -> None:
        import torch

        self.memory = mmap.mmap(-1, SLAB)
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.missing = 0


def _opened(file: Path, direct: int) -> tuple[int, int]:
    """A descriptor, and `direct` if the file system took it."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    try:
        return os.open(file, flags | direct, 0o644), direct
    except OSError as error:
        if error.errno != errno.EINVAL or not direct:
            raise
    file.unlink(missing_ok=True)  # some make it before they refuse
    return os.open(file, flags, 0o644), 0
