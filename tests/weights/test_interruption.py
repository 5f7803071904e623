"""A repair that is killed, or runs out of disk, at any moment: no folder that looks complete, and the next run writes the same bytes."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import resafe.weights
from resafe.cli import main
from resafe.errors import ResafeError
from resafe.finetune.repair import repair
from resafe.weights import _out, write_checkpoint
from tests.mitigations.twins import noisy
from tests.tiny import tiny
from tests.weights.models import adapt, build, shard

CHANGES = ("pwrite", "fsync", "fdatasync", "fdopen", "replace", "rename", "link", "mkdir")  # the calls that leave a trace on the disk
# Moments at which each is killed, and how: the folder that is repaired, the methods, the aligned model, how many times.
REPAIRS: dict[str, tuple[str, list[Any], str, int]] = {
    "full checkpoint": ("tuned", ["restore_weights"], "aligned", 40),
    "adapter": ("adapter", ["restore_weights:strength=0.5"], "aligned", 30),
    "sum of adapters": ("adapter", [{"resta": {"strength": 0.5}}], "aligned", 30),
    "calibrated": ("spoken", ["safe_delta:rows=2,strength=3000"], "speaking", 8),
    "adapter merged and calibrated": ("spoken adapter", ["safe_delta:rows=2,strength=3000"], "speaking", 8),
    "two methods": ("tuned", ["restore_weights:strength=0.25", {"resta": {"strength": 0.5}}], "aligned", 12),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, aligned: Path) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("tuned", "aligned")):
        build("llama", folder / name, seed, torch.bfloat16)
    for seed, name in enumerate(("speaking", "spoken")):
        noisy(tiny("llama", folder / name, aligned, seed))
    for seed, (name, base) in enumerate((("adapter", "aligned"), ("other", "aligned"), ("spoken adapter", "speaking"))):
        adapt(folder / base, folder / name, seed)
    for name in ("tuned", "aligned"):
        shard(folder / name, parts=5)
    return folder


@pytest.fixture(autouse=True)
def many_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them are written past the page cache."""
    monkeypatch.setattr(resafe.weights, "write_checkpoint", partial(write_checkpoint, max_shard_bytes=1500))
    monkeypatch.setattr(_out, "LARGE", 1200)


def restore(home: Path, out: Path, which: str = "full checkpoint") -> Path:
    tuned, methods, before, _ = REPAIRS[which]
    methods = [{"resta": {**m["resta"], "unaligned": str(home / "other")}} if isinstance(m, dict) else m for m in methods]
    return repair(home / tuned, out, methods, aligned=home / before, safety_data="lab" if before == "speaking" else None)


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, which holds the time that was spent."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "resafe.json"}


def watch(monkeypatch: pytest.MonkeyPatch, before: Callable[[str, tuple[Any, ...]], None]) -> None:
    """Call `before` ahead of every change of the disk."""

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before(name, args)
            return original(*args, **kwargs)

        return call

    for name in CHANGES:
        monkeypatch.setattr(os, name, wrapped(name, getattr(os, name)))
    monkeypatch.setattr(shutil, "copyfile", wrapped("copyfile", shutil.copyfile))


def killed_at(moment: int, home: Path, out: Path, which: str, pwrite: Callable[..., int] = os.pwrite) -> bool:
    """Run the repair in a process of its own, which dies of SIGKILL at its `moment`-th change of the disk; False if it made fewer."""
    child = os.fork()
    if child == 0:
        left = moment

        def die(name: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                if name == "pwrite":  # in the middle of a write
                    pwrite(args[0], args[1][: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)

        watch(pytest.MonkeyPatch(), die)
        try:
            restore(home, out, which)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("which", REPAIRS)
def test_whenever_it_is_killed_the_next_run_writes_the_same_bytes(which: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments, kills = list[str](), REPAIRS[which][3]
    with monkeypatch.context() as counting:
        watch(counting, lambda name, _: moments.append(name))
        wanted = content(restore(home, tmp_path / "whole", which))
    assert len([f for f in wanted if f.endswith(".safetensors")]) > (0 if REPAIRS[which][0] == "adapter" else 5)
    assert {"pwrite", "fsync", "fdopen", "replace", "link", "copyfile"} <= set(moments)
    done = 0
    for i, moment in enumerate(random.Random(0).sample(range(len(moments)), min(kills, len(moments)))):
        out = tmp_path / f"out-{i}"
        assert killed_at(moment, home, out, which), f"{moment} of {len(moments)}"
        done += out.exists()
        if out.exists():  # killed after the last rename
            assert content(out) == wanted
        else:
            assert content(restore(home, out, which)) == wanted
    assert done < kills / 2


class Disk:
    """A disk with `room` bytes left: writes what fits and no more; or takes everything, and fails when it is flushed (as NFS does)."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.original = os.pwrite

    def pwrite(self, fd: int, data: memoryview, at: int) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = self.original(fd, data[: self.room], at)
        self.room -= done
        return done

    def fsync(self, fd: int) -> None:
        self.room -= os.fstat(fd).st_size
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
@pytest.mark.parametrize("which", ["full checkpoint", "adapter"])
def test_wherever_the_disk_is_full_nothing_is_left_and_the_next_run_finishes(which: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    wanted = content(restore(home, tmp_path / "whole", which))
    size = sum(len(data) for name, data in wanted.items() if name.endswith(".safetensors"))
    rng = random.Random(1)
    for i in range(12):
        out, disk = tmp_path / f"{call}-{i}", Disk(rng.randrange(size))
        with monkeypatch.context() as full:
            full.setattr(os, call, getattr(disk, call))
            with pytest.raises((ResafeError, OSError), match="No space left"):
                restore(home, out, which)
        assert not out.exists() and not list(tmp_path.rglob("*.partial-*"))
        assert content(restore(home, out, which)) == wanted


@pytest.mark.parametrize(("home_of", "call"), [(os, "fdopen"), (shutil, "copyfile")])
@pytest.mark.parametrize("which", REPAIRS)
def test_a_disk_that_is_full_for_what_stands_beside_the_weights_leaves_nothing(
    which: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home_of: Any, call: str
) -> None:
    original, left = getattr(home_of, call), 1 << 30

    def full(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if (left := left - 1) < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(home_of, call, full)
    wanted = content(restore(home, tmp_path / "whole", which))
    for i in range((1 << 30) - left):
        out, left = tmp_path / f"out-{i}", i
        with pytest.raises((ResafeError, OSError), match="No space left"):
            restore(home, out, which)
        assert not out.exists()
        left = 1 << 30
        assert content(restore(home, out, which)) == wanted


def test_a_full_disk_is_one_line_and_exit_code_2(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr("sys.argv", ["resafe", "repair", str(home / "tuned"), "--aligned", str(home / "aligned"), "-m", "restore_weights", "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "No space left on device. Is the disk full?" in line
