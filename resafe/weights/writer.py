"""Checkpoints and adapters written as they are computed, one shard in memory, visible only when complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.files import check_free, new_folder, write_json
from resafe.models import read_config

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 2 << 30
# What a loader, a server or a lawyer needs beside the weights. Neither optimiser states nor Python code nor resafe.json.
BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def write_checkpoint(
    source_folder: Path,
    target: Path,
    tensors: Iterator[tuple[str, Tensor]],
    max_shard_bytes: int = SHARD_BYTES,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write `tensors` to the new folder `target`, beside copies of the tokenizer and configuration of `source_folder`.

    `config` replaces entries of config.json. Raises ResafeError if `target` holds something or the disk is too full;
    whatever interrupts the iterator leaves no `target`.
    """
    check_free(target)
    _check_room(target, sum(file.stat().st_size for file in source_folder.glob("*.safetensors")))
    with new_folder(target) as folder:
        copy_beside(source_folder, folder)
        if config:
            write_json(folder / "config.json", {**read_config(folder / "config.json"), **config})
        _write_shards(folder, tensors, max_shard_bytes)
    return target


def write_adapter(source_folder: Path, target: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a PEFT adapter to the new folder `target`, beside copies of the tokenizer of `source_folder`."""
    check_free(target)
    _check_room(target, sum(t.nbytes for t in tensors.values()))
    with new_folder(target) as folder:
        copy_beside(source_folder, folder)
        write_json(folder / "adapter_config.json", dict(config))
        _save({name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    return target


def copy_beside(source: Path, target: Path) -> None:
    """Copy what belongs to a model and is not its weights (tokenizer, configuration, templates, licence)."""
    for path in sorted({path for pattern in BESIDE for path in source.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)  # follows links, as caches of downloaded models have them


def _check_room(target: Path, size: int) -> None:
    home = next(p for p in target.absolute().parents if p.exists())
    free = shutil.disk_usage(home).free
    if free < size + (1 << 20):
        raise ResafeError(
            f"{target} needs {size / 1e9:.1f} GB and {home} has {free / 1e9:.1f} GB left: free some space or name another folder."
        )


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], limit: int) -> None:
    parts: list[tuple[list[str], int]] = []
    for shard in _batches(tensors, limit):
        parts.append((list(shard), sum(t.nbytes for t in shard.values())))
        _save(shard, folder / f"part-{len(parts)}")
        shard.clear()  # or this loop would keep it while the next one fills
    if not parts:
        raise ResafeError(f"there are no tensors to write to {folder.name}.")
    if len(parts) == 1:
        (folder / "part-1").rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for i, (names, _) in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / file)
        places.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": sum(size for _, size in parts)}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _batches(tensors: Iterator[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Consecutive tensors, up to `limit` bytes at a time (a larger tensor comes alone)."""
    seen: set[str] = set()
    batch: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"tensor {name} was produced twice")
        seen.add(name)
        if batch and size + tensor.nbytes > limit:
            yield batch
            batch, size = {}, 0
        batch[name] = _own(tensor, batch)
        size += tensor.nbytes
    if batch:
        yield batch


def _own(tensor: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    """`tensor` as safetensors wants it: contiguous, on the CPU, sharing memory with no other of its file."""
    tensor = tensor.detach().cpu().contiguous()
    shared = tensor.numel() and any(tensor.data_ptr() == t.data_ptr() for t in others.values())
    return tensor.clone() if shared else tensor


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise ResafeError(f"cannot write {file.parent}: {str(error).splitlines()[0]}. Is the disk full?") from None
    file.chmod(0o644)
