"""An adapter added into its base: W + s B A, one tensor at a time, computed in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.weights._adapter import Adapter
from resafe.weights._parts import Part, copied
from resafe.weights._pieces import CONV1D, Piece, changed, check_shapes, stored_pieces
from resafe.weights._shards import stored, wide
from resafe.weights.checkpoint import Checkpoint
from resafe.weights.names import counterparts
from resafe.weights.writer import SHARD_BYTES, write_checkpoint

if TYPE_CHECKING:
    from torch import Tensor


def merge_into(base: str | Path, adapter: str | Path, target: Path, max_shard_bytes: int = SHARD_BYTES) -> Path:
    """Write to `target` the full checkpoint that `adapter` makes of `base`, in the base's dtypes.

    An adapter on only one of two tied matrices unties them, as it does in the running model; the result then has both and
    `tie_word_embeddings` false. Raises ResafeError for a quantised base and for an adapter of another model.
    """
    model, update = Checkpoint(base).plain(), Adapter(adapter)
    check_copies(model, update)
    check_shapes(model, update)
    places, config = _places(model, update)
    return write_checkpoint(model.folder, target, _merged(model, update, places), max_shard_bytes, config)


def _places(model: Checkpoint, update: Adapter) -> tuple[dict[str, tuple[str, list[Piece]]], dict[str, Any]]:
    """For each tensor of the result, the base tensor that it starts from and what is added to it."""
    found, heads = stored_pieces(model, update)
    places: dict[str, tuple[str, list[Piece]]] = {name: (name, found.get(name, [])) for name in model.names()}
    untied = model.tied and any(module.vocabulary for module in update.modules.values())
    if untied and model.head is None and model.embedding:
        places[min(heads, default="lm_head.weight")] = (model.embedding, [])
    for name, (source, piece) in heads.items():
        places[name] = (source, [piece])
    return places, {"tie_word_embeddings": False} if untied else {}


def _merged(model: Checkpoint, update: Adapter, places: dict[str, tuple[str, list[Piece]]]) -> list[Part]:
    found = []
    for name, (source, each) in sorted(places.items()):
        part = replace(copied(model, source), name=name)
        found.append(replace(part, whole=True, compute=_sum(model, update, source, each)) if each else part)
    return found


def _sum(model: Checkpoint, update: Adapter, source: str, each: list[Piece]) -> Callable[[int, int], Tensor]:
    def compute(_first: int, _last: int) -> Tensor:
        weight = model.finite(source)
        return stored(wide(weight) + changed(model, update, each, weight), weight.dtype, source)

    return compute


def check_copies(model: Checkpoint, update: Adapter) -> None:
    """Refuse an adapter that carries an embedding or head other than its base's (a resized or trained vocabulary).

    And one that adapts GPT-2's weights as parameters, which are (in, out) then.
    """
    if model.config.get("model_type") in CONV1D and any(module.parameter for module in update.modules.values()):
        raise ResafeError(f"{update.folder} adapts parameters (target_parameters) of {model.folder}: merge it into its base with PEFT and use the full checkpoint.")
    for name in update.names():
        plain = update.base_name(name)
        if plain is None:
            continue
        there = counterparts([plain], model).get(plain)
        if there is None or not update.tensor(name).equal(model.tensor(there).to(update.tensor(name).dtype)):
            raise ResafeError(
                f"{update.folder} carries its own {plain}, other than that of {model.folder} (new tokens, or a trained "
                "embedding): merge it into its base with PEFT and use the full checkpoint."
            )
