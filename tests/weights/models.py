"""Tiny random models on disk, for tests of weights: five architectures, three with experts, their fine-tuned twins and adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

KINDS = ("llama", "qwen2", "mistral", "gemma", "gpt2")
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "head_dim": 4,
}
GPT2: dict[str, Any] = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "qwen2_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12},
    "granitemoe": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8},
}
# What files call parts of names, and what running models do: Granite's experts and router, and Mixtral's mixtures
SPELLED = {"input_linear.weight": "experts.gate_up_proj", "output_linear.weight": "experts.down_proj", "router.layer": "router", "block_sparse_moe": "mlp"}
TARGETS = {"gpt2": ["c_attn", "attn.c_proj"]}
IDS = torch.tensor([[1, 5, 9, 30, 2, 7]])


def build(kind: str, folder: Path, seed: int, dtype: torch.dtype = torch.float32, stacked: bool = False, **changes: Any) -> Path:
    """Save a random model; every parameter is noise, so that no bias or norm is left at a value that hides a mistake.

    `stacked` saves experts as transformers holds them in memory, three-dimensional, not as the architecture's files usually have them.
    """
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {**(GPT2 if kind == "gpt2" else SIZES), **EXPERTS.get(kind, {}), "tie_word_embeddings": kind in ("gpt2", "gemma", "qwen2")}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **special, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, save_original_format=not stacked)
    return folder


def adapt(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """Save a LoRA adapter of `base` with random A and B; unless told, also of its experts and router."""
    model = load(base)
    if "target_modules" not in settings and model.config.model_type in EXPERTS:
        settings.setdefault("target_parameters", ["experts.gate_up_proj", "experts.down_proj", "gate.weight", "router.weight"])
    settings.setdefault("target_modules", TARGETS.get(model.config.model_type, ["q_proj", "v_proj", "down_proj"]))
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **settings}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(folder: Path, base: Path | None = None) -> torch.Tensor:
    """float32 logits of a checkpoint, or of an adapter running on `base`."""
    model = load(base or folder)
    if base is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        return model.float()(IDS).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def rewrite(folder: Path, values: dict[str, torch.Tensor]) -> Path:
    """Replace the single weights file; the tensors are stored in the order given."""
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def configure(folder: Path, file: str = "config.json", **changes: Any) -> Path:
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **changes}))
    return folder


def shard(folder: Path, parts: int = 3) -> Path:
    """Split the single weights file into shards with an index."""
    values = tensors(folder)
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{i % parts + 1:05d}-of-{parts:05d}.safetensors" for i, name in enumerate(sorted(values))}
    for file in set(places.values()):
        save_file({n: values[n] for n, f in places.items() if f == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def stream(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    yield from tensors(folder).items()


def logits_with(folder: Path, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the architecture in `folder` with these weights, put in by hand."""
    model = load(folder)
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in values.items()}, strict=False)
    assert not unexpected and all("lm_head" in name or "bias" in name for name in missing)
    model.tie_weights()
    with torch.no_grad():
        return model.float()(IDS).logits


def as_stored(folder: Path, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What belongs to a running model's parameters (`values`, by their names), by the names of the checkpoint in `folder`; views."""
    found = {}
    for name in tensors(folder):
        there = name
        for part, spelled in SPELLED.items():
            there = there if there in values else there.replace(part, spelled)
        if there in values:
            found[name] = values[there]
        elif ".experts." in there:
            experts, number, part = there.removesuffix(".weight").rsplit(".", 2)
            if part in ("w2", "down_proj"):
                found[name] = values[f"{experts}.down_proj"][int(number)]
            else:
                found[name] = values[f"{experts}.gate_up_proj"][int(number)].tensor_split(2)[part in ("w3", "up_proj")]
    return found


def loaded_with(folder: Path, values: dict[str, torch.Tensor]) -> Any:
    """The model in `folder` with these tensors of a checkpoint put in by hand."""
    model = load(folder)
    places = as_stored(folder, {name: p.data for name, p in model.named_parameters()})
    assert places.keys() == values.keys()
    for name, place in places.items():
        place.copy_(values[name])
    return model
