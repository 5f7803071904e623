"""What the repairs that look at activations or gradients share: a full checkpoint to edit, rows to look at, weights by name."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.files import scratch
from resafe.mitigation import Run
from resafe.models import is_adapter
from resafe.weights import adapter_of

if TYPE_CHECKING:
    from torch import Tensor

    from resafe.models import Loaded
    from resafe.sensitivity import InputMoment
    from resafe.weights import Checkpoint

ROUTER = re.compile(r"\.(router|gate)\.")  # some are modules like any other layer
SINGLE = re.compile(r"\.experts\.\d+\.")


def two_models(run: Run, name: str) -> tuple[Path, Path]:
    """(tuned, aligned) folders. Raises ResafeError if one is not named."""
    if run.tuned is None or run.aligned is None:
        raise ResafeError(f"{name} needs the fine-tuned model and the one before fine-tuning (--aligned).")
    return run.tuned, run.aligned


@contextmanager
def as_full(run: Run, name: str, tuned: Path, base: Path) -> Iterator[Path]:
    """`tuned` as a full checkpoint: itself, or a LoRA merged into `base` for as long as the block runs.

    Editing single entries of W takes an update out of the reach of its rank, so that the result is no adapter any more.
    """
    if not is_adapter(tuned):
        yield tuned
        return
    from resafe.weights import merge_into
    from resafe.weights.writer import TOKENS, copy_beside

    adapter_of(tuned, base)
    run.log(f"{name}: the LoRA is merged into its base; the result is a full checkpoint")
    with scratch(run.output, "merged") as tmp:
        merged = merge_into(base, tuned, tmp / "merged")
        copy_beside(tuned, merged, TOKENS)  # what the adapter was trained with
        yield merged


def sampled(rows: list[Any], n: int, run: Run, name: str) -> list[Any]:
    """At most `n` of `rows`, the same ones for the same seed."""
    return random.Random(f"{name} {run.seed}").sample(rows, min(n, len(rows)))


@dataclass(frozen=True)
class Place:
    """Where a running model has a matrix that a checkpoint stores: in which parameter, of which expert there, and in which rows of it."""

    parameter: str
    turned: bool  # as (in, out), there and in the file
    expert: int | None = None
    rows: tuple[int, int] | None = None  # first, last + 1; None: all

    @property
    def name(self) -> str:
        """What `input_moments` calls it."""
        return self.parameter if self.expert is None else f"{self.parameter}[{self.expert}]"

    def live(self, whole: Tensor) -> Tensor:
        """Its part of `whole`, which is laid out as the parameter, as (out, in); a view."""
        matrix = whole if self.expert is None else whole[self.expert]
        return matrix.T if self.turned else matrix if self.rows is None else matrix[slice(*self.rows)]


@dataclass(frozen=True)
class Layers:
    """The matrices of a checkpoint's linear weights, by the tensor that they are stored in."""

    places: dict[str, list[Place]]

    def __contains__(self, stored: str | None) -> bool:
        return stored in self.places

    def each(self, stored: str, *values: Tensor) -> Iterator[tuple[Place, tuple[Tensor, ...]]]:
        """Each matrix of a tensor and its part of the `values`, which are laid out as the tensor, as (out, in); views."""
        for i, place in enumerate(self.places[stored]):
            matrices = [v[i] if v.ndim == 3 else v for v in values]
            yield place, tuple(m.T if place.turned else m for m in matrices)

    def tell_unseen(self, moments: Mapping[str, InputMoment], log: Callable[[str], None]) -> None:
        """Say how many experts no position that counts was routed to, if any."""
        experts = [p.name for found in self.places.values() for p in found if p.expert is not None]
        if unseen := [name for name in experts if name not in moments]:
            log(f"nothing was routed to {len(unseen)} of {len(experts)} matrices of experts, such as {unseen[0]}: use more rows to judge them")


def layers_of(loaded: Loaded, model: Checkpoint) -> Layers:
    """Where `loaded`, which was loaded from `model`, has its linear layers and experts.

    Raises ResafeError where one is not found, and where any tensor holds NaN or infinity: nothing could be looked at.
    """
    from resafe.sensitivity import linears, stacks
    from resafe.sensitivity.linears import turned
    from resafe.weights import translate

    for name in model.names():
        model.finite(name)
    experts = stacks(loaded.model)
    modules = {name: m for name, m in linears(loaded.model).items() if not (experts and ROUTER.search(name))}
    there = translate(modules, model.names())
    if lost := [n for n in modules if n not in there]:
        raise ResafeError(f"{loaded.folder} stores no tensor for {lost[0]}: this architecture is not supported.")
    places = {there[n]: [Place(n, turned(m))] for n, m in modules.items()}
    for name, module in experts.items():
        places |= _experts(name, module, model)
    return Layers(places)


def _experts(name: str, module: Any, model: Checkpoint) -> dict[str, list[Place]]:
    """The experts of one layer, stored in the same two stacks as in memory, or one by one with gate and way up apart.

    Files of one architecture may spell names and split experts in several ways. A candidate has the layer's number (and the expert's) in its
    name; it is taken where it holds what was loaded. Raises ResafeError where that leaves out a part of a stack.
    """
    from resafe.sensitivity.linears import stacked

    layer = _numbers(name)
    candidates = [n for n in model.names() if _numbers(n)[: len(layer)] == layer and model.floating(n)]
    found: dict[str, list[Place]] = {}
    for part in stacked(module):
        parameter, stack = f"{name}.{part}", getattr(module, part).detach()
        whole = [Place(parameter, module.is_transposed, e) for e in range(len(stack))]
        left = [Place(parameter, False, e, rows) for e in range(len(stack)) for rows in _halves(part, stack)]  # in the files' order, gates first
        for stored in candidates:
            if _holds(model, stored, stack):
                found[stored], left = whole, []
            elif SINGLE.search(stored):
                expert = _numbers(stored)[len(layer) :]
                if place := next((p for p in left if expert == (p.expert,) and _holds(model, stored, p.live(stack))), None):
                    found[stored] = [place]
                    left.remove(place)
        if left:
            raise ResafeError(f"{model.folder} does not store the experts of {parameter} in a form that is known: this architecture is not supported.")
    return found


def _halves(part: str, stack: Tensor) -> list[tuple[int, int] | None]:
    """The rows of an expert that a file may store apart."""
    half = stack.shape[1] // 2
    return [(0, half), (half, 2 * half)] if part == "gate_up_proj" else [None]


def _holds(model: Checkpoint, stored: str, value: Tensor) -> bool:
    """Whether the stored tensor is `value`, in another dtype or the same."""
    return model.shape(stored) == tuple(value.shape) and model.finite(stored).to(value.dtype).equal(value.cpu())


def _numbers(name: str) -> tuple[int, ...]:
    """The parts of a name that are numbers: (0, 3) for model.layers.0.mlp.experts.3.w1.weight."""
    return tuple(int(part) for part in name.split(".") if part.isdigit())
