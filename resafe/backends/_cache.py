"""Key/value caches of rows that come and go: rows are dropped and joined along the batch axis, columns are padded on the left.

Works on `_layers`, which stand in for those of transformers' `DynamicCache`. A sliding layer keeps its last window - 1 columns, but counts all; since rows
are padded on the left, their last columns are the same as the whole cache's, so dropping, padding and trimming treat it like any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

NEEDED = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")
LENGTH_DEPENDENT = ("dynamic", "longrope")  # rotary embeddings whose frequencies change with the longest row of a batch


def joinable(model: Any) -> bool:
    """Whether rows can enter and leave a batch of `model`: full or sliding attention alone, and nothing done to its inputs.

    False for Mamba, linear attention, chunked attention, shared layers, ALiBi without position ids, Phi-3's long rotary embeddings, ...
    """
    from transformers import DynamicCache, GenerationMixin
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    own = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    if own or model.config.is_encoder_decoder or not set(NEEDED) <= set(inspect.signature(model.forward).parameters):
        return False
    text = model.config.get_text_config(decoder=True)
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()) or set(_ropes(text)) & set(LENGTH_DEPENDENT):
        return False
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=model.config).layers)


def _ropes(config: Any) -> Iterator[str]:
    """Kinds of rotary embeddings in a configuration, which may differ between kinds of layers."""
    found = getattr(config, "rope_parameters", None) or {}
    for part in (found, *(v for v in found.values() if isinstance(v, dict))):
        yield str(part.get("rope_type") or "default")


def empty(model: Any) -> Any:
    """A cache for the first tokens of some rows."""
    from transformers import DynamicCache

    from resafe.backends._layers import in_place

    found = DynamicCache(config=model.config)
    found.layers = [in_place(layer) for layer in found.layers]
    return found


def joined(model: Any, parts: Sequence[tuple[Any, Sequence[int]]], width: int) -> Any:
    """One cache of `width` columns with the named rows of several ones, which are emptied on the way to bound the memory.

    A row that has more columns loses its leftmost, which must be padding; one that has fewer gets zeros, which the mask must hide.
    """
    from resafe.backends import _layers

    found = empty(model)
    for i, layer in enumerate(found.layers):
        sources = [(cache.layers[i], list(rows)) for cache, rows in parts if rows]
        held = _held(layer, width)
        keys, values = (_stacked([(getattr(s, what), rows) for s, rows in sources], held) for what in ("keys", "values"))
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.spare = keys, values, _layers.SPARE
        if layer.is_sliding:
            layer.cumulative_length = width
        for source, _ in sources:
            source.keys = source.values = None
    return found


def replace(cache: Any, rows: Sequence[int], part: Any) -> None:
    """Put all rows of `part`, which has no more columns and is emptied, in the places of the named rows of `cache`."""
    import torch

    for layer, source in zip(cache.layers, part.layers):
        places = torch.tensor(rows, device=layer.keys.device)
        with torch.inference_mode():  # as they were made
            for what in ("keys", "values"):
                _lay(getattr(layer, what), places, getattr(source, what))
        source.keys = source.values = None


def trim(cache: Any, width: int) -> None:
    """Let go of all columns but the last `width`."""
    for layer in cache.layers:
        drop = layer.keys.shape[2] - _held(layer, width)
        layer.keys, layer.values = layer.keys[:, :, drop:], layer.values[:, :, drop:]
        if layer.is_sliding:
            layer.cumulative_length = width


def _held(layer: Any, width: int) -> int:
    """Number of columns that a layer keeps of `width`."""
    return min(width, layer.sliding_window - 1) if layer.is_sliding else width


def _stacked(parts: Sequence[tuple[Tensor, list[int]]], width: int) -> Tensor:
    """Rows of tensors of shape (rows, heads, columns, size), aligned on the right in one of `width` columns."""
    from resafe.backends import _layers

    out = _layers.roomy(parts[0][0], sum(len(rows) for _, rows in parts), width, _layers.SPARE)
    start = 0
    for tensor, rows in parts:
        kept = tensor[:, :, max(0, tensor.shape[2] - width) :]
        _lay(out, slice(start, start + len(rows)), kept if rows == list(range(len(tensor))) else kept[rows])
        start += len(rows)
    return out


def _lay(into: Tensor, rows: slice | Tensor, tensor: Tensor) -> None:
    """Write `tensor` into rows of `into`, aligned on the right."""
    width = into.shape[2]
    columns = min(width, tensor.shape[2])
    into[rows, :, : width - columns] = 0  # hidden by the mask, but 0 times what memory may contain can be NaN
    into[rows, :, width - columns :] = tensor[:, :, tensor.shape[2] - columns :]
