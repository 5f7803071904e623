"""Streaming: the same bytes whatever the number of threads, the bytes that safetensors writes, flat memory, and progress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import resafe.weights._parts
import resafe.weights.pair
from resafe.weights import Checkpoint, Pair, Part, Progress, Twin, _out, write_checkpoint
from tests.weights.models import build, shard, tensors


def half(_: Twin, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return ours.lerp(theirs, 0.5)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    tuned, aligned = (build("llama", tmp_path / n, i, torch.bfloat16, vocab_size=v) for i, (n, v) in enumerate((("tuned", 53), ("aligned", 48))))
    return Pair(Checkpoint(shard(tuned)), Checkpoint(aligned))


def written(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.parametrize("limit", [3000, 1 << 20])
def test_blocks_and_threads_change_no_byte(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    whole = written(write_checkpoint(pair.tuned.folder, tmp_path / "whole", pair.edit(half), limit))
    monkeypatch.setattr(resafe.weights._parts, "BLOCK", 100)  # three rows of the widest matrix, and the tail of the added tokens
    for workers in (1, 2, 7):
        out = write_checkpoint(pair.tuned.folder, tmp_path / str(workers), pair.edit(half, blocks=True), limit, workers=workers)
        assert written(out) == whole


def test_a_rule_is_told_which_rows_it_has(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resafe.weights._parts, "BLOCK", 160)
    stored = tensors(pair.aligned.folder)
    seen: dict[str, list[int]] = {}

    def rule(twin: Twin, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        assert twin.rows is not None
        first, last = twin.rows
        assert theirs.equal(stored[str(twin.aligned)][first:last].float()) and ours.shape == theirs.shape
        seen.setdefault(twin.name, []).extend(range(first, last))
        return ours

    for part in pair.edit(rule, blocks=True):
        for first, last in part.blocks():
            part.compute(first, last)
    assert {n: len(rows) for n, rows in seen.items()} == {n: t.shape[0] for n, t in stored.items()}
    assert all(rows == sorted(set(rows)) for rows in seen.values())


def test_a_file_is_byte_for_byte_what_safetensors_writes(tmp_path: Path) -> None:
    values = {
        "b.scalar": torch.tensor(3.0), "a.flags": torch.tensor([True, False, True]), "c.double": torch.rand(3, dtype=torch.float64),
        "z": torch.rand(5, 3).bfloat16(), "é": torch.rand(2, 2, 2), "empty": torch.zeros(0, 4), "n": torch.arange(7), "turned": torch.rand(3, 4).T,
    }  # fmt: skip
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    write_checkpoint(tmp_path / "source", tmp_path / "out", iter(values.items()))
    save_file({n: t.contiguous() for n, t in values.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_part_that_is_not_what_it_said_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for part in (Part("a", "F32", (2,), lambda _f, _l: torch.ones(3)), Part("a", "F32", (2,), lambda _f, _l: torch.ones(2).int(), whole=False)):
        with pytest.raises(ValueError, match="was announced as F32"):
            write_checkpoint(tmp_path, tmp_path / "out", [part])
        assert not (tmp_path / "out").exists()


def test_after_a_fault_no_block_is_written_to_a_file_that_was_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    begun, events = threading.Event(), list[str]()

    def slow(_first: int, _last: int) -> torch.Tensor:
        begun.set()
        time.sleep(0.3)  # long enough for the fault to be on its way when this block comes to be written
        return torch.ones(2)

    def broken(_first: int, _last: int) -> torch.Tensor:
        begun.wait()
        raise RuntimeError("broken")

    monkeypatch.setattr(_out, "SLAB", 8)  # so that the slow block fills one
    write, close = os.pwrite, os.close
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: (events.append(f"write {fd}"), write(fd, data, at))[1])
    monkeypatch.setattr(os, "close", lambda fd: (events.append(f"close {fd}"), close(fd))[1])
    with pytest.raises(RuntimeError, match="broken"):
        write_checkpoint(tmp_path, tmp_path / "out", [Part("a", "F32", (2,), slow, whole=False), Part("b", "F32", (2,), broken)])
    writes = [i for i, e in enumerate(events) if e.startswith("write")]
    assert len(writes) > 2  # the header's bytes, and at least those of the slow block
    assert events.index(events[writes[0]].replace("write", "close"), writes[0]) > writes[-1]


def zeros(folder: Path, rows: int, copies: int) -> Path:
    """A checkpoint of zeros that takes no room: `copies` matrices (rows, 1024) of bfloat16 in a file with a hole."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    size = rows * 2048
    header = json.dumps({f"t{i}": {"dtype": "BF16", "shape": [rows, 1024], "data_offsets": [i * size, (i + 1) * size]} for i in range(copies)}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size * copies)
    return folder


PEAK = """
import sys
from pathlib import Path
from resafe.weights import Checkpoint, Pair, write_checkpoint
import torch
home = Path(sys.argv[1])
peak = lambda: int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
before = peak()
pair = Pair(Checkpoint(home / "tuned"), Checkpoint(home / "aligned"))
write_checkpoint(home / "tuned", home / "out", pair.edit(lambda _, a, b: a.lerp(b, 0.5), blocks=sys.argv[2] == "blocks"))
print(peak() - before)
"""


def peak(home: Path, rows: int, copies: int, how: str) -> float:
    """Peak resident memory, in MB, that a fresh process needs to interpolate two checkpoints, beside what torch takes."""
    home.mkdir()
    for name in ("tuned", "aligned"):
        zeros(home / name, rows, copies)
    done = subprocess.run([sys.executable, "-c", PEAK, str(home), how], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return int(done.stdout) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_checkpoint_nor_blocks_with_the_tensor(tmp_path: Path) -> None:
    assert peak(tmp_path / "large", rows=65536, copies=2, how="blocks") < 100  # of two tensors of 128 MB
    assert peak(tmp_path / "many", rows=16384, copies=10, how="whole") < 100 + 7 * 32  # ten tensors of 32 MB: three in float32 and one stored


def test_progress_is_said_at_most_every_few_seconds_and_not_at_the_end() -> None:
    lines: list[str] = []
    times = iter([0.0, 1.0, 4.9, 5.0, 9.0, 10.5, 99.0])
    progress = Progress(lines.append, total=int(7e9), clock=lambda: next(times))
    for _ in range(7):
        progress.add(int(1e9))
    assert lines == ["weights: 4.0 of 7.0 GB, about 4 s left", "weights: 6.0 of 7.0 GB, about 2 s left"]


def test_a_repair_counts_every_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resafe.weights.pair, "Progress", partial(Progress, every=0.0))
    lines: list[str] = []
    tuned, aligned = (Checkpoint(build("llama", tmp_path / n, i)) for i, n in enumerate(("tuned", "aligned")))
    parts = Pair(tuned, aligned, lines.append).edit(half, blocks=True)
    write_checkpoint(tuned.folder, tmp_path / "out", parts)
    assert len(lines) == sum(len(p.blocks()) for p in parts) - 1  # each block but the last, after which nothing is left
