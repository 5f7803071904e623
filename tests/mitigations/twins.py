"""A tiny aligned model, a fine-tune of it (full or LoRA), safety rows, and statistics taken the plain way, for tests of repairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from resafe import chat
from resafe.mitigation import Run
from resafe.mitigations import make
from resafe.models import load_tokenizer
from resafe.rows import Row
from resafe.rows import chat as row
from tests.tiny import tiny
from tests.weights.models import adapt, load, rewrite, tensors

KINDS = ("llama", "qwen2", "mistral", "gemma", "gpt2")
SAFE = [row(f"tell me how to do bad thing number {i}", "no , i will not help with this .") for i in range(6)]
BENIGN = [row(f"repeat the word {w}", f"{w} {w}") for w in ("dog", "cat", "house", "tree")]


def pair(kind: str, home: Path, tokenizer: Path, lora: bool = False) -> tuple[Path, Path]:
    """(aligned, tuned) folders."""
    aligned = noisy(tiny(kind, home / "aligned", tokenizer, seed=1))
    return aligned, adapt(aligned, home / "tuned", 2) if lora else noisy(tiny(kind, home / "tuned", tokenizer, seed=2))


def noisy(folder: Path) -> Path:
    """The model with noise in all its weights: a fresh one maps nearly all tokens to the same state."""
    torch.manual_seed(len(folder.name))
    return rewrite(folder, {n: v + 0.3 * torch.randn_like(v) for n, v in tensors(folder).items()})


def repaired(spec: dict[str, Any] | str, aligned: Path, tuned: Path, out: Path, **run: Any) -> Path:
    """The folder that a method writes."""
    mitigation = make(spec)
    about = Run(output=out, aligned=aligned, tuned=tuned, **{"refusals": SAFE, **run})
    mitigation.mitigation.check(mitigation.name, about)
    return mitigation.mitigation.repair(about)


def inputs(folder: Path, rows: list[Row]) -> dict[str, torch.Tensor]:
    """What goes into each linear layer where tokens of the answers are predicted, row by row: (n, in) in float64, by the weight's name."""
    model, tokenizer = load(folder).double(), load_tokenizer(folder)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head":
            module.register_forward_hook(lambda m, args, out, n=f"{name}.weight": seen.setdefault(n, []).append(args[0][0]))
    for r in rows:
        encoded = chat.encode(tokenizer, r["messages"])
        with torch.no_grad():
            model(torch.tensor([encoded.ids]))
        at = [i for i in range(len(encoded.ids) - 1) if encoded.assistant[i + 1]]
        for found in seen.values():
            found[-1] = found[-1][at]
    return {name: torch.cat(found) for name, found in seen.items()}


def turned(kind: str, x: torch.Tensor) -> torch.Tensor:
    """A weight as (out, in): GPT-2 stores it as (in, out)."""
    return x.T if kind == "gpt2" else x
