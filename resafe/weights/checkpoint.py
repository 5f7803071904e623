"""A full checkpoint on disk, opened without loading it: tensors by name, one at a time, safetensors only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from resafe.errors import ResafeError
from resafe.models import INDEX, is_adapter, read_config, weight_map
from resafe.weights._parts import BLOCK
from resafe.weights._shards import DTYPES, Shards

SINGLE = "model.safetensors"
EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tokens_embed.weight", "embeddings.weight",
    "embed_tokens_per_layer.weight",
)  # fmt: skip
POSITIONS = ("wpe.weight", "embed_positions.weight", "position_embeddings.weight", "positions_embed.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
# What bitsandbytes, GPTQ, AWQ, HQQ, compressed-tensors and MXFP4 (gpt-oss) store beside, or instead of, a weight.
PACKED = re.compile(
    r"\.(absmax|nested_absmax|quant_map|quant_state\..+|SCB|qweight|qzeros|W_q|weight_packed|weight_scale(_inv)?"
    r"|(gate_up|down)_proj_(blocks|scales))$"
)
BYTES = ("U8", "I8")  # in which 4 and 8 bit weights are packed; a weight of plain floats never is


class Checkpoint(Shards):
    """The model in `folder`. Raises ResafeError for a folder without sound safetensors weights."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        super().__init__(_files(self.folder))
        self.config: dict[str, Any] = read_config(self.folder / "config.json")
        self.embedding = _ending(self._entries, EMBEDDINGS)
        self.head = _ending(self._entries, HEADS)  # None where the file leaves it out
        _check_index(self.folder, self)

    @property
    def quantised(self) -> str | None:
        """How the weights are packed ("bitsandbytes", ...), or None for plain floats."""
        settings = self.config.get("quantization_config")
        if settings:
            return str(settings.get("quant_method", "quantised")) if isinstance(settings, dict) else "quantised"
        packed = (name for name in self.names() if PACKED.search(name) or self._packed(name))
        name = next(packed, None)
        return f"tensor {name} is {self.dtype(name)}" if name else None

    def _packed(self, name: str) -> bool:
        kind = self.dtype(name)
        return kind not in DTYPES or kind.startswith("F8") or (kind in BYTES and name.endswith((".weight", "_proj")))

    def plain(self) -> Checkpoint:
        """Itself; raises ResafeError when the weights are quantised, since packed bits cannot be averaged."""
        if self.quantised:
            raise ResafeError(
                f"{self.folder} is quantised ({self.quantised}) and its weights cannot be edited: use the unquantised "
                "checkpoint, or fine-tune with LoRA, where the adapter is edited instead."
            )
        return self

    @cached_property
    def tied(self) -> bool:
        """Whether one matrix is both embedding and head, as loaders see it: stored once, or twice with equal values."""
        if self.embedding is None:
            return False
        if self.head is None:
            return True
        asked = self.config.get("tie_word_embeddings", True)
        if not asked or self.shape(self.head) != self.shape(self.embedding):
            return False
        return bool((self.tensor(self.head) == self.tensor(self.embedding)).all())


def is_head(name: str) -> bool:
    """Whether `name` is that of an output head's matrix."""
    return _ending([name], HEADS) is not None


def is_embedding(name: str) -> bool:
    """Whether `name` is that of an input or position embedding."""
    return _ending([name], (*EMBEDDINGS, *POSITIONS)) is not None


def is_vocabulary(name: str) -> bool:
    """Whether `name` has one row per token: the input embedding, the output head, or the head's bias."""
    return _ending([name], (*EMBEDDINGS, *HEADS, "lm_head.bias", "embed_out.bias")) is not None


def same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints hold the same tensors under the same names, bit for bit.

    Where `one` alone is quantised, whether what it holds unpacked is what `other` holds, rounded to its dtype.
    """
    if one.folder.resolve() == other.folder.resolve():
        return True
    if one.quantised and not other.quantised:
        plain = [n for n in one.names() if n in other and one.floating(n) and one.shape(n) == other.shape(n)]
        return bool(plain) and all(other.tensor(n).to((value := one.tensor(n)).dtype).equal(value) for n in plain)
    if one.names() != other.names():
        return False
    return all(same_tensor(one, n, other, n) for n in sorted(one.names(), key=one.nbytes))  # training seldom spares the small ones


def same_tensor(one: Shards, name: str, other: Shards, there: str) -> bool:
    """Whether two stored tensors are equal bit for bit, compared some rows at a time."""
    if (one.dtype(name), one.shape(name)) != (other.dtype(there), other.shape(there)):
        return False
    rows = one.height(name)
    step = max(1, BLOCK * rows // max(1, one.nbytes(name)))
    return all(one.tensor(name, i, min(rows, i + step)).equal(other.tensor(there, i, min(rows, i + step))) for i in range(0, rows, step))


def _ending(names: Iterable[str], endings: tuple[str, ...]) -> str | None:
    found = [n for n in names if n in endings or n.endswith(tuple(f".{e}" for e in endings))]
    return min(found, key=lambda n: (n.count("."), n), default=None)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ResafeError(f"no such model folder: {folder}")
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return [folder / shard for shard in sorted(set(weight_map(folder).values()))]
    if is_adapter(folder):
        raise ResafeError(f"{folder} is a LoRA adapter, and a full checkpoint is needed here: merge it into its base first.")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ResafeError(f"{folder} holds pickled weights, which can run code: convert them to safetensors first.")
    raise ResafeError(f"{folder} holds no weights: {SINGLE} or {INDEX} is expected.")


def _check_index(folder: Path, found: Shards) -> None:
    if (folder / SINGLE).is_file():
        return
    places = weight_map(folder)
    for name, shard in sorted(places.items()):
        if name not in found or found.file(name).name != shard:
            raise ResafeError(f"{folder / INDEX} promises tensor {name} in {shard}, which lacks it: copy that shard again.")
    if extra := sorted(set(found.names()) - places.keys()):
        raise ResafeError(
            f"{found.file(extra[0])} holds tensor {extra[0]}, which {INDEX} does not list: the shards are not all of one model; copy them again."
        )
