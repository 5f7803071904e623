"""Tiny random models of real architectures with the lab's tokenizer, for tests of everything that takes a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from resafe.models import load_tokenizer

KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2")
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "head_dim": 4,
}  # fmt: skip
GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 512}


def tiny(kind: str, folder: Path, tokenizer_from: Path, seed: int = 0, template: bool = True, stacked: bool = False, **changes: Any) -> Path:
    """Save a random model of `kind` with a tokenizer, with or without a chat template, experts as its files usually have them or `stacked`."""
    tokenizer = load_tokenizer(tokenizer_from)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer) + 16, bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **{**(GPT2 if kind == "gpt2" else SIZES), **changes},
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, save_original_format=not stacked)
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder
