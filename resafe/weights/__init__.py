"""Weights on disk: opened lazily, joined by name, computed in float32 one tensor at a time, written whole or not at all."""

from resafe.weights._parts import Item, Part
from resafe.weights._progress import Progress
from resafe.weights._shards import Shards, wide
from resafe.weights.checkpoint import Checkpoint, same_weights
from resafe.weights.lora import Adapter, Module, adapter_of, check_copies, concat, merge_into, rescale
from resafe.weights.names import check_tokenizers, counterparts, translate
from resafe.weights.pair import Pair, Rule, Twin
from resafe.weights.writer import write_adapter, write_checkpoint

__all__ = [
    "Adapter",
    "Checkpoint",
    "Item",
    "Module",
    "Pair",
    "Part",
    "Progress",
    "Rule",
    "Shards",
    "Twin",
    "check_copies",
    "check_tokenizers",
    "adapter_of",
    "concat",
    "counterparts",
    "merge_into",
    "rescale",
    "same_weights",
    "translate",
    "wide",
    "write_adapter",
    "write_checkpoint",
]
