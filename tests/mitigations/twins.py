"""A tiny aligned model, a fine-tune of it (full or LoRA), safety rows, and statistics taken the plain way, for tests of repairs."""

from __future__ import annotations

import re
from collections import defaultdict
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
from tests.weights.models import EXPERTS, adapt, load, rewrite, tensors

KINDS = ("llama", "qwen2", "mistral", "gemma", "gpt2", "mixtral", "mixtral stacked", "qwen2_moe", "gpt_oss")
GPT2 = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # Conv1D
SAFE = [row(f"tell me how to do bad thing number {i}", "no , i will not help with this .") for i in range(6)]
BENIGN = [row(f"repeat the word {w}", f"{w} {w}") for w in ("dog", "cat", "house", "tree")]


def pair(kind: str, home: Path, tokenizer: Path, lora: bool = False) -> tuple[Path, Path]:
    """(aligned, tuned) folders."""
    kind, *stacked = kind.split()
    how: dict[str, Any] = {"stacked": bool(stacked), **EXPERTS.get(kind, {})}
    aligned = noisy(tiny(kind, home / "aligned", tokenizer, seed=1, **how))
    return aligned, adapt(aligned, home / "tuned", 2) if lora else noisy(tiny(kind, home / "tuned", tokenizer, seed=2, **how))


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


def maps(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors with stacks taken apart and all linear maps as (out, in): GPT-2 and gpt-oss store theirs as (in, out). Views."""
    found: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        if value.ndim == 3:
            turn = any("sinks" in n for n in values)  # gpt-oss
            found |= {f"{name}[{e}]": m.T if turn else m for e, m in enumerate(value)}
        else:
            found[name] = value.T if GPT2.search(name) else value
    return found


def inputs(folder: Path, rows: list[Row]) -> dict[str, torch.Tensor]:
    """What goes into each of the `maps` where tokens of the answers are predicted, row by row: (n, in) in float64; experts token by token."""
    model, tokenizer, seen = load(folder).double(), load_tokenizer(folder), defaultdict[str, list[torch.Tensor]](list)
    now: dict[str, Any] = {}
    model.set_experts_implementation("eager")  # the default takes no float64
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head":
            module.register_forward_hook(lambda m, args, out, n=f"{name}.weight": now.update({n: args[0].flatten(0, -2)}))
        if name.endswith(".experts"):
            module.register_forward_hook(lambda m, args, out, n=name: now.update({n: (m, *args[:2])}))
    for r in rows:
        encoded = chat.encode(tokenizer, r["messages"])
        with torch.no_grad():
            model(torch.tensor([encoded.ids]))
        for i in (i for i in range(len(encoded.ids) - 1) if encoded.assistant[i + 1]):
            for name, what in now.items():
                for key, x in {name: what[i]}.items() if name.endswith(".weight") else _routed(folder, name, *what, i).items():
                    seen[key].append(x)
    return {name: torch.stack(found) for name, found in seen.items()}


def _routed(folder: Path, name: str, experts: Any, states: torch.Tensor, chosen: torch.Tensor, i: int) -> dict[str, torch.Tensor]:
    """The inputs of the experts that token `i` goes to, by the names of `maps`."""
    found: dict[str, torch.Tensor] = {}
    for e in chosen[i].tolist():
        x, w = states[i], experts.gate_up_proj[e].detach()
        if hasattr(experts, "limit"):  # gpt-oss: gate and way up take turns, and both have a bias
            h = x @ w + experts.gate_up_proj_bias[e].detach()
            gate, up = h[::2].clamp(max=7.0), h[1::2].clamp(-7.0, 7.0)
            y = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
        else:
            gate, up = (w @ x).tensor_split(2)
            y = gate / (1 + torch.exp(-gate)) * up
        names = [n for n in tensors(folder) if n.startswith(name.rsplit(".mlp", 1)[0] + ".") and (f".experts.{e}." in n or n.endswith(("gate_up_proj", ".down_proj")))]
        for n in names:
            found[n if f".{e}." in n.split("experts")[1] else f"{n}[{e}]"] = y if "down_proj" in n or ".w2." in n else x
    return found
