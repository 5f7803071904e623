"""LoRA adapters, edited without their base model: scaled, summed; or merged into it. dW = s B A throughout.

Sums stack the factors: adding A to A and B to B, as is often done, makes cross terms that belong to neither adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.weights._adapter import Adapter, Module
from resafe.weights._merge import check_copies, merge_into
from resafe.weights._shards import wide
from resafe.weights.writer import write_adapter

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Adapter", "Module", "check_copies", "concat", "merge_into", "rescale"]


def rescale(
    adapter: str | Path | Adapter, factor: float | Callable[[Module], float], out: Path, base: str | None = None
) -> Path:
    """Write to `out` the adapter whose update is `factor` times that of `adapter`; `factor` may depend on the module.

    B is multiplied in float32 and rounded to its stored dtype: exact up to that rounding, and exactly for powers of two.
    The configuration stays, except that `base` replaces base_model_name_or_path.
    """
    source = adapter if isinstance(adapter, Adapter) else Adapter(adapter)
    tensors = {name: source.finite(name) for name in source.names()}
    for module in source.modules.values():
        by = factor(module) if callable(factor) else factor
        tensors[module.b] = (by * wide(tensors[module.b])).to(tensors[module.b].dtype)
    return write_adapter(source.folder, out, _based(source.config, base), tensors)


def concat(first: str | Path | Adapter, second: str | Path | Adapter, out: Path, base: str | None = None) -> Path:
    """Write to `out` the adapter whose update is s1 B1 A1 + s2 B2 A2, for two adapters of the same base.

    Ranks, scales and target modules may differ: A = [A1; A2], B = [s1 B1, s2 B2], padded with zeros to one rank R, which is
    also alpha, so that s = 1. Stored in float32, because s B seldom fits 16 bits. `base` replaces base_model_name_or_path.
    """
    one = first if isinstance(first, Adapter) else Adapter(first)
    two = second if isinstance(second, Adapter) else Adapter(second)
    _check_same_base(one, two, base)
    tensors = _copies(one, two)
    names = sorted(one.modules.keys() | two.modules.keys())
    rank = max(sum(a.modules[n].rank for a in (one, two) if n in a.modules) for n in names)
    for name in names:
        tensors.update(_stack([(a, a.modules[name]) for a in (one, two) if name in a.modules], rank))
    return write_adapter(one.folder, out, _config(one, names, rank, base), tensors)


def _stack(parts: list[tuple[Adapter, Module]], rank: int) -> dict[str, Tensor]:
    import torch

    a = [wide(adapter.finite(m.a)).float() for adapter, m in parts]
    b = [m.scale * wide(adapter.finite(m.b)).float() for adapter, m in parts]
    if len({(x.shape[1], y.shape[0]) for x, y in zip(a, b)}) > 1:
        raise ResafeError(f"{parts[0][1].name} has different sizes in the two adapters: they are not of the same base.")
    spare = rank - sum(m.rank for _, m in parts)
    a.append(torch.zeros(spare, a[0].shape[1]))
    b.append(torch.zeros(b[0].shape[0], spare))
    return {parts[0][1].a: torch.cat(a, 0), parts[0][1].b: torch.cat(b, 1)}


def _config(adapter: Adapter, modules: list[str], rank: int, base: str | None) -> dict[str, Any]:
    config = {
        **adapter.config,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": modules,
        "init_lora_weights": True,
    }
    # Each narrows target_modules further, or describes how the first adapter was started.
    config.update(dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern", "eva_config")))
    return _based(config, base)


def _based(config: dict[str, Any], base: str | None) -> dict[str, Any]:
    return config if base is None else {**config, "base_model_name_or_path": base}


def _check_same_base(one: Adapter, two: Adapter, base: str | None) -> None:
    bases = [str(a.config.get("base_model_name_or_path")) for a in (one, two)]
    if base is None and bases[0] != bases[1] and Path(bases[0]).resolve() != Path(bases[1]).resolve():
        raise ResafeError(f"{one.folder} and {two.folder} have different bases: {bases[0]} and {bases[1]}.")
    if bool(one.config.get("fan_in_fan_out")) != bool(two.config.get("fan_in_fan_out")):
        raise ResafeError(f"{one.folder} and {two.folder} disagree on fan_in_fan_out: they are not of the same base.")


def _copies(one: Adapter, two: Adapter) -> dict[str, Tensor]:
    """Tensors of the base that PEFT saved along."""
    found: dict[str, Tensor] = {}
    for adapter in (one, two):
        for name in (n for n in adapter.names() if adapter.base_name(n)):
            value = adapter.finite(name)
            if name in found and not found[name].equal(value):
                raise ResafeError(f"{one.folder} and {two.folder} carry different {name}: they are not of the same base.")
            found[name] = value
    return found
