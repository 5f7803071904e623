"""Checkpoints and adapters written as they are computed, block by block, visible only when complete.

Every byte has its place before anything is computed, so the files are the same however many threads there are.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.files import check_free, new_folder, write_json
from resafe.models import read_config
from resafe.weights._out import Out
from resafe.weights._parts import Item, Part, parts
from resafe.weights._shards import DTYPES, as_bytes, height

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 2 << 30
WORKERS = 4  # more do not help: by then the disk, or the lock that a file system takes to write a file, is what is waited for
# What a loader, a server or a lawyer needs beside the weights. Neither optimiser states nor Python code nor resafe.json.
TOKENS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
)
BESIDE = (
    *TOKENS,
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def write_checkpoint(
    source_folder: Path,
    target: Path,
    tensors: Iterable[Item],
    max_shard_bytes: int = SHARD_BYTES,
    config: Mapping[str, Any] | None = None,
    workers: int | None = None,
) -> Path:
    """Write `tensors` to the new folder `target`, beside copies of the tokenizer and configuration of `source_folder`.

    Parts (as `Pair.edit` gives them) are computed in `workers` threads (default: one per core, at most 4), a few blocks in memory at a time;
    of (name, tensor) pairs a shard is in memory at a time. `config` replaces entries of config.json. Raises ResafeError if `target` holds
    something or the disk is too full; whatever interrupts the work leaves no `target`.
    """
    check_free(target)
    known = isinstance(tensors, list) and all(isinstance(t, Part) for t in tensors)
    size = sum(t.nbytes for t in parts(tensors)) if known else sum(f.stat().st_size for f in source_folder.glob("*.safetensors"))
    check_room(target, size)
    with new_folder(target) as folder:
        copy_beside(source_folder, folder)
        if config:
            write_json(folder / "config.json", {**read_config(folder / "config.json"), **config})
        _keep_freed_memory()
        apart = known and not any(p.whole for p in parts(tensors))
        threads = workers or min(WORKERS, os.cpu_count() or 1)
        with _one_core_each(apart), ThreadPoolExecutor(threads) as pool:
            _write_shards(folder, parts(tensors), max_shard_bytes, pool, threads if apart else 1)
    return target


def write_adapter(source_folder: Path, target: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a PEFT adapter to the new folder `target`, beside copies of the tokenizer of `source_folder`."""
    check_free(target)
    check_room(target, sum(t.nbytes for t in tensors.values()))
    with new_folder(target) as folder:
        copy_beside(source_folder, folder)
        write_json(folder / "adapter_config.json", dict(config))
        with ThreadPoolExecutor(1) as pool:
            _write_files([folder / "adapter_model.safetensors"], [list(parts(tensors.items()))], pool)
    return target


def copy_beside(source: Path, target: Path, which: Iterable[str] = BESIDE) -> None:
    """Copy what belongs to a model and is not its weights (tokenizer, configuration, templates, licence)."""
    for path in sorted({path for pattern in which for path in source.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)  # follows links, as caches of downloaded models have them


def check_room(target: Path, size: int) -> None:
    """Raise ResafeError where the disk has no room for `size` bytes."""
    home = next(p for p in target.absolute().parents if p.exists())
    free = shutil.disk_usage(home).free
    if free < size + (1 << 20):
        raise ResafeError(
            f"{target} needs {size / 1e9:.1f} GB and {home} has {free / 1e9:.1f} GB left: free some space or name another folder."
        )


def _write_shards(folder: Path, tensors: Iterator[Part], limit: int, pool: ThreadPoolExecutor, together: int = 1) -> None:
    """All shards, `together` of them at a time: a file system lets one thread write to a file."""
    written: list[tuple[list[str], int]] = []
    batches = _batches(tensors, limit)
    while group := list(islice(batches, together)):
        files = [folder / f"part-{len(written) + 1 + i}" for i in range(len(group))]
        written += [([p.name for p in shard], sum(p.nbytes for p in shard)) for shard in group]
        _write_files(files, group, pool)
        for shard in group:
            shard.clear()  # or this loop would keep its tensors while the next one fills
    if not written:
        raise ResafeError(f"there are no tensors to write to {folder.name}.")
    if len(written) == 1:
        (folder / "part-1").rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for i, (names, _) in enumerate(written, 1):
        file = f"model-{i:05d}-of-{len(written):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / file)
        places.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": sum(size for _, size in written)}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def _batches(tensors: Iterator[Part], limit: int) -> Iterator[list[Part]]:
    """Consecutive parts, up to `limit` bytes at a time (a larger one comes alone)."""
    seen: set[str] = set()
    batch: list[Part] = []
    size = 0
    for part in tensors:
        if part.name in seen:
            raise ValueError(f"tensor {part.name} was produced twice")
        seen.add(part.name)
        if batch and size + part.nbytes > limit:
            yield batch
            batch, size = [], 0
        batch.append(part)
        size += part.nbytes
    if batch:
        yield batch


def _write_files(files: Sequence[Path], shards: Sequence[list[Part]], pool: ThreadPoolExecutor) -> None:
    """Safetensors files, a block of each in turn. Blocks are computed by `pool`, a few at a time; whole parts here."""
    running: deque[Future[None]] = deque()
    outs: list[Out] = []
    try:
        with ThreadPoolExecutor(len(files)) as writer:
            try:
                jobs = []
                for file, shard in zip(files, shards):
                    shard = _in_order(shard)
                    head = _header(shard)
                    outs.append(Out(file, len(head) + sum(p.nbytes for p in shard), writer))
                    jobs.append(_jobs(outs[-1], head, shard))
                for job in _in_turn(jobs):
                    if len(running) > 2 * WORKERS:
                        running[0].result()
                        running.popleft()  # only now: an interruption must find it below
                    running.append(pool.submit(job))
                for left in running:
                    left.result()
                for out in outs:
                    out.finish()
            finally:
                for left in running:
                    left.cancel()
                wait(running)
    finally:
        for out in outs:
            out.close()  # by now nobody can write to a descriptor that is closed, and perhaps given to another file


def _in_order(shard: Iterable[Part]) -> list[Part]:
    """As safetensors has them, so that every tensor is aligned."""
    order = list(DTYPES)
    return sorted(shard, key=lambda p: (-order.index(p.dtype), p.name))


def _jobs(out: Out, head: bytes, shard: list[Part]) -> Iterator[Callable[[], None]]:
    """What is to be done for a file, in order; whole parts are computed on the way."""
    import torch

    out.put(torch.frombuffer(bytearray(head), dtype=torch.uint8), 0)
    at = len(head)
    for part in shard:
        row = part.nbytes // max(1, height(part.shape))
        for first, last in part.blocks():
            fill = partial(_fill, out, at + first * row, part, first, last)
            if part.whole:
                fill()
            else:
                yield fill
        at += part.nbytes


def _in_turn(sources: Iterable[Iterator[Callable[[], None]]]) -> Iterator[Callable[[], None]]:
    waiting = deque(sources)
    while waiting:
        source = waiting.popleft()
        if (job := next(source, None)) is not None:
            yield job
            waiting.append(source)


def _fill(out: Out, at: int, part: Part, first: int, last: int) -> None:
    value = part.compute(first, last).detach().cpu().contiguous()
    wanted = (last - first, *part.shape[1:]) if part.shape else ()
    if tuple(value.shape) != wanted or str(value.dtype) != f"torch.{DTYPES[part.dtype]}":
        raise ValueError(f"{part.name} was announced as {part.dtype} {list(wanted)} and came as {value.dtype} {list(value.shape)}")
    out.put(as_bytes(value), at)


@contextmanager
def _one_core_each(apart: bool) -> Iterator[None]:
    """Let torch use one core per thread where all the work is blocks: they are too small to be cut up further."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if apart else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _keep_freed_memory() -> None:
    """Let the C library keep memory that is freed, up to 64 MB, instead of giving it back to the system at every block.

    glibc raises its limits to the largest piece that was ever freed. Without it, half of the time goes to page faults.
    """
    import torch

    torch.empty(30 << 20, dtype=torch.uint8)


def _header(shard: list[Part]) -> bytes:
    """The safetensors header: its length, then JSON padded to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for part in shard:
        entries[part.name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [at, at + part.nbytes]}
        at += part.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
