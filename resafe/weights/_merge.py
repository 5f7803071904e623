"""An adapter added into its base: W + s B A, one tensor at a time, computed in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.weights._adapter import Adapter, Module
from resafe.weights._parts import Part, copied
from resafe.weights._shards import stored, wide
from resafe.weights.checkpoint import Checkpoint
from resafe.weights.names import counterparts, translate
from resafe.weights.writer import SHARD_BYTES, write_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # model types whose linear weights are (in, out)


def merge_into(base: str | Path, adapter: str | Path, target: Path, max_shard_bytes: int = SHARD_BYTES) -> Path:
    """Write to `target` the full checkpoint that `adapter` makes of `base`, in the base's dtypes.

    An adapter on only one of two tied matrices unties them, as it does in the running model; the result then has both and
    `tie_word_embeddings` false. Raises ResafeError for a quantised base and for an adapter of another model.
    """
    model, update = Checkpoint(base).plain(), Adapter(adapter)
    check_copies(model, update)
    places, config = _places(model, update)
    return write_checkpoint(model.folder, target, _merged(model, update, places), max_shard_bytes, config)


def _places(model: Checkpoint, update: Adapter) -> tuple[dict[str, tuple[str, Module | None]], dict[str, Any]]:
    """For each tensor of the result, the base tensor that it starts from and the module added to it."""
    places: dict[str, tuple[str, Module | None]] = {name: (name, None) for name in model.names()}
    weights = {f"{name}.weight": module for name, module in update.modules.items()}
    found = counterparts(weights, model)
    if missing := sorted(weights.keys() - found.keys()):
        raise ResafeError(f"{model.folder} has no tensor {missing[0]}, which {update.folder} adapts: is this its base?")
    stored = translate(weights, model.names())
    untied = model.tied and any(module.vocabulary for module in weights.values())
    if untied and model.head is None and model.embedding:
        places[_head_name(weights)] = (model.embedding, None)
    for name, module in weights.items():
        result = stored.get(name, name)
        places[result] = (found[name], module)
    return places, {"tie_word_embeddings": False} if untied else {}


def _head_name(weights: dict[str, Module]) -> str:
    heads = [name for name, module in weights.items() if module.vocabulary and not module.embedding]
    return heads[0] if heads else "lm_head.weight"


def _merged(model: Checkpoint, update: Adapter, places: dict[str, tuple[str, Module | None]]) -> list[Part]:
    found = []
    for name, (source, module) in sorted(places.items()):
        part = replace(copied(model, source), name=name)
        found.append(part if module is None else replace(part, whole=True, compute=_sum(model, update, source, module)))
    return found


def _sum(model: Checkpoint, update: Adapter, source: str, module: Module) -> Callable[[int, int], Tensor]:
    def compute(_first: int, _last: int) -> Tensor:
        weight = model.finite(source)
        return stored(wide(weight) + oriented(model, update, module, weight), weight.dtype, source)

    return compute


def oriented(model: Checkpoint, update: Adapter, module: Module, weight: Tensor) -> Tensor:
    """dW laid out as `weight` is; shapes decide, and the architecture where the matrix is square."""
    delta = update.delta(module)
    fits, turned = delta.shape == weight.shape, delta.T.shape == weight.shape
    if not (fits or turned):
        raise ResafeError(
            f"{module.name} has shape {list(weight.shape)} in {model.folder} and {list(delta.shape)} in {update.folder}: "
            "the adapter is of another model."
        )
    if module.embedding:
        return delta if fits else delta.T
    conv1d = update.config.get("fan_in_fan_out") or model.config.get("model_type") in CONV1D
    if fits and turned:
        return delta.T if conv1d and not module.vocabulary else delta
    return delta if fits else delta.T


def check_copies(model: Checkpoint, update: Adapter) -> None:
    """Refuse an adapter that carries an embedding or head other than its base's (a resized or trained vocabulary)."""
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
