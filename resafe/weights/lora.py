"""LoRA adapters, edited without their base model: scaled, summed; or merged into it. dW = s B A throughout.

Sums stack the factors: adding A to A and B to B, as is often done, makes cross terms that belong to neither adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.models import base_of
from resafe.weights._adapter import Adapter, Module
from resafe.weights._merge import check_copies, merge_into
from resafe.weights._shards import wide
from resafe.weights.checkpoint import Checkpoint, same_weights
from resafe.weights.names import check_tokenizers
from resafe.weights.writer import write_adapter

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Adapter", "Factor", "Module", "adapter_of", "check_copies", "concat", "merge_into", "rescale", "truncated"]

Factor = float | Callable[[Module], float]


def adapter_of(tuned: Path, aligned: Path) -> Adapter:
    """The adapter in `tuned`, refused unless its base is `aligned`: its update is relative to that model.

    The base may be `aligned` in 4 or 8 bits: what was left unpacked (norms, embeddings) is compared.
    """
    adapter = Adapter(tuned)
    base, model = base_of(tuned), Checkpoint(aligned)
    check_tokenizers(tuned, aligned)
    if base.resolve() != aligned.resolve() and not same_weights(Checkpoint(base), model):
        raise ResafeError(
            f"the adapter {tuned} was trained on {base}, whose weights are not those of {aligned}: name that base with --aligned, "
            "or merge the adapter into it and restore the full checkpoint."
        )
    check_copies(model, adapter)
    return adapter


def rescale(
    adapter: str | Path | Adapter, factor: Factor, out: Path, base: str | None = None
) -> Path:
    """Write to `out` the adapter whose update is `factor` times that of `adapter`; `factor` may depend on the module.

    B is multiplied in float32 and rounded to its stored dtype: exact up to that rounding, and exactly for powers of two.
    The configuration stays, except that `base` replaces base_model_name_or_path.
    """
    source = adapter if isinstance(adapter, Adapter) else Adapter(adapter)
    tensors = {name: source.finite(name) for name in source.names()}
    for module in source.modules.values():
        tensors[module.b] = (_at(factor, module) * wide(tensors[module.b])).to(tensors[module.b].dtype)
    return write_adapter(source.folder, out, _based(source.config, base), tensors)


def concat(
    first: str | Path | Adapter,
    second: str | Path | Adapter,
    out: Path,
    base: str | None = None,
    factors: tuple[Factor, Factor] = (1.0, 1.0),
    rank: int = 0,
    log: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write to `out` the adapter whose update is f1 s1 B1 A1 + f2 s2 B2 A2, for two adapters of the same base.

    Ranks, scales and target modules may differ, and a factor may depend on the module: A = [A1; A2],
    B = [f1 s1 B1, f2 s2 B2], padded with zeros to one rank R, which is also alpha, so that the scale is 1. Stored in float32,
    because s B seldom fits 16 bits. What has factor 0 takes up no rank, and a module of which nothing is left is none of the
    result's. `base` replaces base_model_name_or_path.

    With `rank`, each module's sum is cut to that rank (Eckart-Young), and `log` is told which share of the squared norm is
    lost; 0 loses nothing.
    """
    one, two = (a if isinstance(a, Adapter) else Adapter(a) for a in (first, second))
    _check_same_base(one, two, base)
    tensors, sums = _copies(one, two), {}
    for name in sorted(one.modules.keys() | two.modules.keys()):
        terms = [(a, a.modules[name], _at(f, a.modules[name])) for a, f in zip((one, two), factors) if name in a.modules]
        if terms := [t for t in terms if t[2]]:
            sums[name] = _stack(terms)
    if not sums:
        raise ResafeError(f"nothing is left of the updates {one.folder} and {two.folder} with these factors: the sum is their base itself.")
    if rank:
        sums = _cut(sums, rank, log)
    widest = max(len(a) for _, a in sums.values())
    for name, (b, a) in sums.items():
        module = (one if name in one.modules else two).modules[name]
        tensors |= {module.b: _padded(b, (0, widest - b.shape[1])), module.a: _padded(a, (0, 0, 0, widest - len(a)))}
    return write_adapter(one.folder, out, _config(one, list(sums), widest, base), tensors)


def _at(factor: Factor, module: Module) -> float:
    return factor(module) if callable(factor) else factor


def _stack(terms: Sequence[tuple[Adapter, Module, float]]) -> tuple[Tensor, Tensor]:
    """B (out, R) and A (R, in) of the sum of all terms, in float32."""
    import torch

    a = [wide(adapter.finite(m.a)).float() for adapter, m, _ in terms]
    b = [factor * m.scale * wide(adapter.finite(m.b)).float() for adapter, m, factor in terms]
    if len({(x.shape[1], y.shape[0]) for x, y in zip(a, b)}) > 1:
        raise ResafeError(f"{terms[0][1].name} has different sizes in the two adapters: they are not of the same base.")
    return torch.cat(b, 1), torch.cat(a, 0)


def _padded(x: Tensor, by: tuple[int, ...]) -> Tensor:
    import torch

    return torch.nn.functional.pad(x, by).contiguous()


def _cut(sums: Mapping[str, tuple[Tensor, Tensor]], rank: int, log: Callable[[str], None]) -> dict[str, tuple[Tensor, Tensor]]:
    """The best approximations of rank `rank`."""
    found, lost, whole = {}, dict[str, float](), 0.0
    for name, (b, a) in sums.items():
        found[name], values = truncated(b, a, rank)
        lost[name] = float(values[rank:].square().sum())
        whole += float(values.square().sum())
    worst = max(lost, key=lambda n: lost[n])
    share = sum(lost.values()) / whole if whole else 0.0
    log(f"cut to rank {rank}: {100 * share:.2g} % of the update's squared norm is lost, most of it in {worst}" if share else f"cut to rank {rank}: nothing is lost")
    return found


def truncated(b: Tensor, a: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """B (out, k) and A (k, in) whose product is the best approximation of b a of rank k = min(rank, r), and b a's r singular values.

    From two thin QR decompositions and one of r x r: b a itself is never formed. Each factor takes the root of the values.
    """
    import torch

    left, right = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
    u, values, vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    root = values[:rank].sqrt()
    return (((left.Q @ u[:, :rank]) * root).to(b.dtype), (root[:, None] * (vh[:rank] @ right.Q.T)).to(a.dtype)), values


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
