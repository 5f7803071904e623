"""LoRA adapters as PEFT stores them: dW = s B A (arXiv 2106.09685, section 4.1).

s is alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732). A is (r, in), B is (out, r); PEFT keeps that
orientation for GPT-2's Conv1D, whose weights are (in, out). For an embedding, A is (r, rows), B is (width, r) and dW is
the transpose. For a stack of E experts, which is one parameter ("target_parameters"), A is (E r, in), expert by expert, and B
(out, r E), rank by rank: dW of expert e is s B[:, e::E] A[e r : (e + 1) r].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.models import is_adapter, read_config
from resafe.weights._shards import Shards, wide
from resafe.weights.checkpoint import is_vocabulary

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."
FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?$")
# Settings under which the change is not s B A alone.
BEYOND = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "ensure_weight_tying",
)
# Initialisations that leave the base weights alone. PiSSA, OLoRA, CorDA, LoftQ and others subtract the first B A from them.
PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
# Stacks of a layer's experts, in the order in which models define them: PEFT wraps the first innermost.
STACKS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Module:
    """One adapted weight: its name in the running base model, the stored names of A and B, its rank and s."""

    weight: str
    a: str
    b: str
    rank: int
    scale: float
    embedding: bool
    experts: int | None = None  # of a stack: how many
    parameter: bool = False  # adapted as a parameter, not as a module

    @property
    def vocabulary(self) -> bool:
        """Whether this is the input embedding or the output head."""
        return is_vocabulary(self.weight)


class Adapter(Shards):
    """The LoRA adapter in `folder`. Raises ResafeError for what is not, or not only, LoRA."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not is_adapter(self.folder):
            raise ResafeError(f"{folder} is not a LoRA adapter: it has no adapter_config.json.")
        self.config = read_config(self.folder / "adapter_config.json")
        _check_kind(self.folder, self.config)
        weights = self.folder / "adapter_model.safetensors"
        if not weights.is_file() and (self.folder / "adapter_model.bin").is_file():
            raise ResafeError(f"{folder} holds pickled weights, which can run code: save the adapter as safetensors first.")
        super().__init__([weights])
        self.modules = self._modules()
        self._recent = lru_cache(maxsize=2)(self._factors)

    def _modules(self) -> dict[str, Module]:
        """By the name of the weight."""
        factors: dict[str, dict[str, dict[str, str]]] = {}  # of a module: its wrappers' names, each with those of A and B
        for name in self.names():
            if match := FACTOR.match(name):
                wrapper = match["module"].removeprefix(PREFIX)
                factors.setdefault(unwrapped(wrapper), {}).setdefault(wrapper, {})[match["side"]] = name
            elif self.base_name(name) is None:
                raise ResafeError(f"{self.folder} holds {name}, which is no part of a LoRA update: merge it into its base with PEFT.")
        if not factors:
            raise ResafeError(f"{self.folder} holds no LoRA weights.")
        found = [self._module(weight, sides) for name, wrappers in factors.items() for weight, sides in self._weights(name, wrappers)]
        return {module.weight: module for module in sorted(found, key=lambda m: m.weight)}

    def _weights(self, name: str, wrappers: Mapping[str, Mapping[str, str]]) -> list[tuple[str, Mapping[str, str]]]:
        """The weights that a module's factors adapt: its own, or its stacks of experts, of which PEFT saves the names by how they are nested."""
        stacks = [f"{name}.{part}" for part in STACKS if name.endswith("experts") and self._targeted(f"{name}.{part}")]
        inside_out = [wrappers[w] for w in sorted(wrappers, key=len, reverse=True)]
        if len(inside_out) != max(1, len(stacks)):
            settings = f"target_parameters={self.config.get('target_parameters')!r}"
            raise ResafeError(f"{self.folder} adapts {name} in a way that is not known ({settings}): merge it into its base with PEFT first.")
        return list(zip(stacks or [f"{name}.weight"], inside_out))

    def _targeted(self, weight: str) -> bool:
        """Whether PEFT was asked to adapt a parameter, as it matches their names."""
        return any(weight == t or weight.endswith(f".{t}") for t in self.config.get("target_parameters") or [])

    def _module(self, weight: str, sides: Mapping[str, str]) -> Module:
        if len(sides) < 2:
            raise ResafeError(f"{self.folder} holds only one of lora_A and lora_B for {weight.removesuffix('.weight')}: save the adapter again.")
        a, b = self.shape(sides["A"]), self.shape(sides["B"])
        parameter, stack = self._targeted(weight), not weight.endswith(".weight")
        name = weight if parameter else weight.removesuffix(".weight")  # what PEFT looks for in its patterns
        rank = int(self._setting("rank_pattern", "r", name))
        experts = a[0] // max(1, rank) if stack and a else None
        if len(a) != 2 or len(b) != 2 or a[0] != rank * (experts or 1) or b[1] != a[0] or not a[0]:
            raise ResafeError(f"{name} in {self.folder} has A {list(a)} and B {list(b)}, which do not fit rank {rank}.")
        alpha = self._setting("alpha_pattern", "lora_alpha", name)
        scale = alpha / sqrt(rank) if self.config.get("use_rslora") else alpha / rank
        return Module(weight, sides["A"], sides["B"], rank, scale, "lora_embedding_" in sides["A"], experts, parameter)

    def _setting(self, patterns: str, default: str, module: str) -> float:
        """A number of adapter_config.json: that of the first pattern which fits the module, as PEFT matches them, or the default."""
        where, value = patterns, self.config.get(patterns) or {}
        try:
            own = [(pattern, v) for pattern, v in value.items() if re.match(rf"(.*\.)?({pattern})$", module)]
            where, value = (f"{patterns}.{own[0][0]}", own[0][1]) if own else (default, self.config.get(default, 8))  # 8 is PEFT's own
            if isinstance(value, bool) or not isfinite(number := float(value)):
                raise ValueError
            return number
        except (AttributeError, TypeError, ValueError, OverflowError, re.error):
            raise ResafeError(f"{self.folder}/adapter_config.json: {where} is {value!r}, which cannot be used: repair the file or save the adapter again.") from None

    def base_name(self, name: str) -> str | None:
        """The base model's name of a tensor that PEFT saved along unchanged (embedding or head), None for a factor."""
        plain = unwrapped(name.removeprefix(PREFIX))
        return plain if is_vocabulary(plain) else None

    def factors(self, module: Module) -> tuple[Tensor, Tensor]:
        """B and A as they are stored, in wide floats; to be read only.

        Those of the last two stacks stay in memory: whoever goes from expert to expert asks for them again and again.
        """
        return self._factors(module) if module.experts is None else self._recent(module)

    def _factors(self, module: Module) -> tuple[Tensor, Tensor]:
        return wide(self.finite(module.b)), wide(self.finite(module.a))

    def delta(self, module: Module) -> Tensor:
        """dW = s B A in float32, (out, in); (rows, width) for an embedding, (expert, out, in) for a stack."""
        b, a = self.factors(module)
        if module.experts is None:
            product = b @ a
            return module.scale * (product.T if module.embedding else product)
        return module.scale * (apart(module, b) @ apart_a(module, a))


def unwrapped(name: str) -> str:
    """A module's (or tensor's) name without what PEFT's wrappers put into it."""
    return re.sub(r"\.base_layer(?=\.|$)", "", name)


def apart(module: Module, b: Tensor) -> Tensor:
    """B, or what is laid out as it, by expert: (expert, out, r), a view; a plain weight is its only expert."""
    return b.view(len(b), -1, module.experts or 1).permute(2, 0, 1)


def apart_a(module: Module, a: Tensor) -> Tensor:
    """A by expert: (expert, r, in), a view."""
    return a.view(module.experts or 1, -1, a.shape[1])


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ResafeError(f"{folder} is a {kind} adapter; only LoRA can be edited. Merge it into its base with PEFT first.")
    extra = [key for key in BEYOND if config.get(key)]
    if config.get("bias", "none") != "none":
        extra.append("bias")
    if config.get("init_lora_weights", True) not in PLAIN_INIT:
        extra.append("init_lora_weights")
    if not isinstance(config.get("target_parameters") or [], list):
        extra.append("target_parameters")
    if extra:
        settings = ", ".join(f"{key}={config[key]!r}" for key in extra)
        raise ResafeError(f"{folder} changes more than a LoRA update ({settings}): merge it into its base with PEFT first.")
