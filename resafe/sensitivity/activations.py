"""Second moments of what goes into each linear layer and each expert, for all of them in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.sensitivity.batches import Batch
from resafe.sensitivity.linears import expert_inputs, linears, stacked, stacks

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class InputMoment:
    """The sum of x x^T, (in, in), or of x^2, (in,), over the `count` inputs x that count; on the CPU."""

    total: Tensor
    count: int = 0

    @property
    def squares(self) -> Tensor:
        """The sum of x^2 per input, (in,)."""
        return self.total if self.total.ndim == 1 else self.total.diagonal()


def input_moments(model: Any, batches: Iterable[Batch], full: bool = True) -> dict[str, InputMoment]:
    """By name of the weight, the moments of each linear layer's inputs at the positions that count.

    Of experts in a stack, each by itself and at the positions that were routed to it: the name is the stack's with the expert's
    number after it ("...experts.down_proj[3]"). An expert that no such position came to is left out.

    Layers that are given the same tensor (query, key and value; gate and up) share one sum. Sums are float64, since a
    few inputs of language models are so large that float32 would lose the directions of all others; the matrices of
    Llama-2-7B then take 44 GB of main memory, and those of a mixture several times as much. Leaves `model` as it was.
    """
    import torch

    sums = _Sums(full)
    with torch.no_grad(), _hooked(model, sums):
        for batch in batches:
            sums.batch = batch.to(model.device)
            model(input_ids=sums.batch.ids, attention_mask=sums.batch.attention, use_cache=False)
    return {name: sums.found[owner] for name, owner in sums.owner.items()}


class _Sums:
    """What the hooks add to."""

    def __init__(self, full: bool) -> None:
        self.full = full
        self.batch: Batch | None = None
        self.found: dict[str, InputMoment] = {}
        self.owner: dict[str, str] = {}  # name -> the layer whose sum it shares
        self._last: tuple[Any, str] = (None, "")

    def add(self, name: str, module: Any, args: tuple[Any, ...]) -> None:
        x = args[0]
        if x is self._last[0]:
            self.owner[name] = self._last[1]
            return
        self._last, self.owner[name] = (x, name), name
        self._grow(name, self._counted(name, x))

    def add_experts(self, name: str, module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        states, chosen = (self._counted(name, x) for x in (*args, *named.values())[:2])
        first, last = (f"{name}.{p}" for p in stacked(module))
        for e, x, y in expert_inputs(module, states, chosen):
            for what, inputs in ((f"{first}[{e}]", x), (f"{last}[{e}]", y)):
                self.owner[what] = what
                self._grow(what, inputs)

    def _counted(self, name: str, x: Tensor) -> Tensor:
        """The positions of `x` (rows, length, .) that count, (n, .); rows may be joined, and other sides of size 1 between."""
        assert self.batch is not None
        counts = self.batch.counts
        sides = [n for n in x.shape[:-1] if n > 1]
        if sides in ([n for n in counts.shape if n > 1], [n for n in (counts.numel(),) if n > 1]):
            return x.reshape(counts.numel(), -1)[counts.flatten()]
        raise ResafeError(f"{name} sees only some of the tokens (a mixture of experts), so its inputs cannot be told apart: this model is not supported.")

    def _grow(self, name: str, x: Tensor) -> None:
        """Add the rows of `x`, (n, in)."""
        x = x.double()
        more = x.T @ x if self.full else x.square().sum(0)
        if name in self.found:
            self.found[name].total += more.cpu()
        else:
            self.found[name] = InputMoment(more.cpu())
        self.found[name].count += len(x)


@contextmanager
def _hooked(model: Any, sums: _Sums) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(partial(sums.add, name)) for name, module in linears(model).items()]
    handles += [module.register_forward_pre_hook(partial(sums.add_experts, name), with_kwargs=True) for name, module in stacks(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
