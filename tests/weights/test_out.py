"""A file that threads fill in any order holds every byte in its place, past the page cache or through it, and no more."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from resafe.errors import ResafeError
from resafe.weights import _out

SIZES = (1, 4095, 4096, 4097, 8192, 40_000, 8192 * 9)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_out, "SLAB", 8192)
    monkeypatch.setattr(_out, "LARGE", 4096)


def fill(file: Path, size: int, seed: int) -> bytes:
    """What was put into a file of `size` random bytes, in pieces of up to 3000 that neighbours swap, by four threads."""
    rng = random.Random(seed)
    wanted = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    cuts = sorted({0, size, *(rng.randrange(size) for _ in range(size // 1500))})
    pieces = sorted(zip(cuts, cuts[1:]), key=lambda piece: piece[0] + rng.randrange(6000))
    with ThreadPoolExecutor(4) as pool, ThreadPoolExecutor(4) as writer:
        out = _out.Out(file, size, writer)
        for done in [pool.submit(out.put, wanted[a:b], a) for a, b in pieces]:
            done.result()
        out.finish()
    out.close()
    return bytes(wanted.numpy())


def past_the_cache(folder: Path) -> bool:
    """Whether the file system here writes so."""
    try:
        fd = os.open(folder / "probe", os.O_CREAT | os.O_WRONLY | _out.DIRECT)
    except OSError:
        return False
    os.close(fd)
    return bool(_out.DIRECT)


def test_every_byte_is_in_its_place(tmp_path: Path) -> None:
    for size in SIZES:
        for seed in range(3):
            file = tmp_path / f"{size}-{seed}"
            assert fill(file, size, seed) == file.read_bytes()


def test_a_large_file_is_written_past_the_cache_in_whole_slabs_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not past_the_cache(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    opened, lengths, inside = list[int](), list[int](), list[int]()
    original, write = os.open, os.pwrite

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        inside.append(1)
        time.sleep(0.02)
        assert len(inside) == 1 and at % 4096 == 0
        lengths.append(len(data))
        done = write(fd, data, at)
        inside.clear()
        return done

    monkeypatch.setattr(os, "open", lambda path, flags, *mode: (opened.append(flags & _out.DIRECT), original(path, flags, *mode))[1])
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert fill(tmp_path / "large", 40_000, 0) == (tmp_path / "large").read_bytes()
    assert sorted(lengths) == [8192] * 5 and (tmp_path / "large").stat().st_size == 40_000
    assert fill(tmp_path / "small", 4095, 0) == (tmp_path / "small").read_bytes()
    assert opened == [_out.DIRECT, 0] and lengths[-1] == 4095


def refused_at_open(monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.open

    def opening(path: Any, flags: int, *mode: int) -> int:
        fd = original(path, flags & ~_out.DIRECT, *mode)
        if flags & _out.DIRECT:
            os.close(fd)
            raise OSError(errno.EINVAL, "Invalid argument")
        return fd

    monkeypatch.setattr(os, "open", opening)


def refused_when_written(monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.pwrite

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & _out.DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)


def cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes take a page at a time."""
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: original(fd, data[:4096], at))


def cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a page, 1000 bytes count: the next write would begin where none may past the cache."""
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: min(1000, original(fd, data[:4096], at)))


@pytest.mark.parametrize("fault", [refused_at_open, refused_when_written, cut_short, cut_anywhere])
def test_a_file_system_that_does_not_write_past_the_cache_is_written_through_it(
    fault: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    for size in SIZES:
        file = tmp_path / str(size)
        assert fill(file, size, 1) == file.read_bytes()


@pytest.mark.parametrize("which", range(5))
def test_a_write_that_fails_once_is_said(which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, done = os.pwrite, list[int]()

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        done.append(at)
        if len(done) == which + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(ResafeError, match="No space left on device. Is the disk full"):
        fill(tmp_path / "file", 40_000, 0)


def test_slabs_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, slab = list[int](), _out._Slab
    monkeypatch.setattr(_out, "_Slab", lambda: (made.append(1), slab())[1])
    fill(tmp_path / "file", 8192 * 60, 0)
    assert len(made) < 20  # of 60; about two that are being filled for each thread


def test_a_file_that_was_not_filled_is_a_fault(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as writer:
        out = _out.Out(tmp_path / "file", 10, writer)
        out.put(torch.zeros(9, dtype=torch.uint8), 0)
        with pytest.raises(ValueError, match="file was not filled"):
            out.finish()
        out.close()
