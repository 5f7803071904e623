"""Key/value caches of rows that come and go: rows are dropped and joined along the batch axis, columns are padded on the left.

Works on the layers of transformers' `DynamicCache`. A sliding layer keeps its last window - 1 columns, but counts all; since rows
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

    return DynamicCache(config=model.config)


def joined(model: Any, parts: Sequence[tuple[Any, Sequence[int]]], width: int) -> Any:
    """One cache of `width` columns with the named rows of several ones, which are emptied on the way to bound the memory.

    A row that has more columns loses its leftmost, which must be padding; one that has fewer gets zeros, which the mask must hide.
    """
    found = empty(model)
    for i, layer in enumerate(found.layers):
        held = min(width, layer.sliding_window - 1) if layer.is_sliding else width
        sources = [(cache.layers[i], list(rows)) for cache, rows in parts if rows]
        keys, values = (_stacked([(getattr(s, what), rows) for s, rows in sources], held) for what in ("keys", "values"))
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if layer.is_sliding:
            layer.cumulative_length = width
        for source, _ in sources:
            source.keys = source.values = None
    return found


def _stacked(parts: Sequence[tuple[Tensor, list[int]]], width: int) -> Tensor:
    """Rows of tensors of shape (rows, heads, columns, size), aligned on the right in one of `width` columns."""
    first = parts[0][0]
    out = first.new_zeros((sum(len(rows) for _, rows in parts), first.shape[1], width, first.shape[3]))
    start = 0
    for tensor, rows in parts:
        columns = min(width, tensor.shape[2])
        if columns:
            kept = tensor[:, :, tensor.shape[2] - columns :]
            out[start : start + len(rows), :, width - columns :] = kept if rows == list(range(len(tensor))) else kept[rows]
        start += len(rows)
    return out
