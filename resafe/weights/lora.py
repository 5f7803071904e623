"""LoRA adapters, edited without their base model: scaled, summed; or merged into it. dW = s B A throughout.

Sums stack the factors: adding A to A and B to B, as is often done, makes cross terms that belong to neither adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.models import base_of
from resafe.weights._adapter import PREFIX, STACKS, Adapter, Module, apart, apart_a
from resafe.weights._merge import check_copies, merge_into
from resafe.weights._pieces import SINGLE, Piece, check_shapes, pieces, stored_pieces
from resafe.weights._shards import wide
from resafe.weights.checkpoint import Checkpoint, same_weights
from resafe.weights.names import check_tokenizers
from resafe.weights.writer import write_adapter

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Adapter", "Factor", "Module", "adapter_of", "check_copies", "concat", "merge_into", "rescale", "truncated"]

Factors = tuple["Tensor", "Tensor"]
# A number or, for the experts of a stack, a tensor laid out as B; or what gives either for a module.
Factor = float | Callable[[Module], Any]


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
    check_shapes(model, adapter)
    if not model.quantised:  # whose weights may have other names
        stored_pieces(model, adapter)
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
    result's. Where one adapts a mixture's experts one by one and the other in stacks, so does the result in stacks. `base` replaces
    base_model_name_or_path.

    With `rank`, each module's sum is cut to that rank (Eckart-Young), and `log` is told which share of the squared norm is
    lost; 0 loses nothing.
    """
    one, two = (a if isinstance(a, Adapter) else Adapter(a) for a in (first, second))
    _check_same_base(one, two, base)
    tensors, terms = _copies(one, two), (_terms(one, two, factors[0]), _terms(two, one, factors[1]))
    sums = {name: _stacked(name, [t[name] for t in terms if name in t]) for name in sorted(terms[0].keys() | terms[1].keys())}
    if not sums:
        raise ResafeError(f"nothing is left of the updates {one.folder} and {two.folder} with these factors: the sum is their base itself.")
    if rank:
        sums = _cut(sums, rank, log)
    widest = max(a.shape[1] for _, a in sums.values())
    kept = {name: (one if name in one.modules else two).modules[name] for name in sums}
    for name, (b, a) in sums.items():
        b, a = _padded(b, (0, widest - b.shape[2])), _padded(a, (0, 0, 0, widest - a.shape[1]))
        side_a, side_b = _names(kept[name], kept)
        tensors |= {side_b: b.permute(1, 2, 0).reshape(b.shape[1], -1).contiguous(), side_a: a.reshape(-1, a.shape[2]).contiguous()}
    return write_adapter(one.folder, out, _config(one, kept, widest, base), tensors)


def _at(factor: Factor, module: Module) -> float | Tensor:
    return factor(module) if callable(factor) else factor


def _terms(adapter: Adapter, other: Adapter, factor: Factor) -> dict[str, Factors]:
    """f s B (expert, out, r) and A (expert, r, in) of each weight, in float32; a plain weight is its only expert.

    Of single experts whose stack `other` adapts, those of the stack; what has factor 0 is left out.
    """
    stacks = {w: m for w, m in other.modules.items() if m.experts is not None and w not in adapter.modules}
    within = {name: piece for name, (piece, *_) in pieces(stacks, adapter.modules).items()}
    found: dict[str, Factors] = {}
    single: dict[str, list[tuple[Piece, Tensor, Tensor]]] = {}
    for name, module in adapter.modules.items():
        share = _at(factor, module)
        if not (bool(share) if isinstance(share, float | int) else bool(share.any())) and not SINGLE.match(name):  # PEFT reads all experts or none
            continue
        b, a = adapter.factors(module)
        b, a = (share * module.scale * b).float(), a.float()
        if name in within:
            single.setdefault(within[name].module.weight, []).append((within[name], b, a))
        else:
            found[name] = apart(module, b), apart_a(module, a)
    return found | {stack: _gathered(stacks[stack], each) for stack, each in single.items()}


def _gathered(stack: Module, each: Sequence[tuple[Piece, Tensor, Tensor]]) -> Factors:
    """The factors of a stack from those of single experts; two halves of its rows take a rank each."""
    rank, parts = max(len(a) for _, _, a in each), 1 if each[0][0].half is None else 2
    rows, columns = len(each[0][1]), each[0][2].shape[1]
    b, a = each[0][1].new_zeros(stack.experts or 1, parts * rows, parts * rank), each[0][2].new_zeros(stack.experts or 1, parts * rank, columns)
    for piece, y, x in each:
        e, half = piece.expert or 0, piece.half or 0
        b[e, half * rows : (half + 1) * rows, half * rank : half * rank + len(x)] = y
        a[e, half * rank : half * rank + len(x)] = x
    return b, a


def _stacked(name: str, terms: Sequence[Factors]) -> Factors:
    """The factors of the terms' sum: B side by side, A one below the other."""
    import torch

    if len({(b.shape[0], b.shape[1], a.shape[2]) for b, a in terms}) > 1:
        raise ResafeError(f"{name} has different sizes in the two adapters: they are not of the same base.")
    return torch.cat([b for b, _ in terms], 2), torch.cat([a for _, a in terms], 1)


def _names(module: Module, kept: Iterable[str]) -> tuple[str, str]:
    """What PEFT calls A and B in an adapter of the weights `kept`: of several stacks of one module, the first is wrapped innermost."""
    if module.experts is None:
        return module.a, module.b
    name, _, part = module.weight.rpartition(".")
    outside = [p for p in STACKS[STACKS.index(part) + 1 :] if f"{name}.{p}" in kept]
    where = PREFIX + name + ".base_layer" * len(outside)
    return f"{where}.lora_A.weight", f"{where}.lora_B.weight"


def _padded(x: Tensor, by: tuple[int, ...]) -> Tensor:
    import torch

    return torch.nn.functional.pad(x, by)


def _cut(sums: Mapping[str, tuple[Tensor, Tensor]], rank: int, log: Callable[[str], None]) -> dict[str, tuple[Tensor, Tensor]]:
    """The best approximations of rank `rank`."""
    import torch

    found, lost, whole = {}, dict[str, float](), 0.0
    for name, (b, a) in sums.items():
        cut = [truncated(*factors, rank) for factors in zip(b, a)]
        found[name] = torch.stack([y for (y, _), _ in cut]), torch.stack([x for (_, x), _ in cut])
        lost[name] = sum(float(values[rank:].square().sum()) for _, values in cut)
        whole += sum(float(values.square().sum()) for _, values in cut)
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


def _config(adapter: Adapter, kept: Mapping[str, Module], rank: int, base: str | None) -> dict[str, Any]:
    parameters = [name for name, module in kept.items() if module.parameter]
    config = {
        **adapter.config,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": [name.removesuffix(".weight") for name in kept if name not in parameters],
        "target_parameters": parameters or None,
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
    if other := [n for n in one.modules.keys() & two.modules.keys() if one.modules[n].experts != two.modules[n].experts]:
        raise ResafeError(f"{one.folder} and {two.folder} have different numbers of experts in {min(other)}: they are not of the same base.")


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
