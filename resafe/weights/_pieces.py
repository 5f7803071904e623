"""Where a checkpoint stores what a LoRA adapter changes.

An adapter has the names of the running model. Files of mixtures may spell them in other ways, and hold a stack of experts one by one,
with gate and way up apart: then each stored matrix takes its expert's part of the factors, and its half of B's rows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resafe.errors import ResafeError
from resafe.weights._adapter import Adapter, Module, apart, apart_a
from resafe.weights.checkpoint import is_head
from resafe.weights.names import translate

if TYPE_CHECKING:
    from torch import Tensor

    from resafe.weights.checkpoint import Checkpoint

CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # model types whose linear weights are (in, out)
STACKED_IN_OUT = ("gpt_oss", "aria", "aria_text", "llama4", "llama4_text")  # and those whose stacks are (expert, in, out)
TURNED = ("gpt_oss", "aria", "aria_text")  # of these, those of which PEFT knows it: A is on the inputs' side there, on the outputs' of the others
SINGLE = re.compile(r"^(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>\w+)\.weight$")
# What files call one expert's matrices: the stacks that they may be a part of, and the rows there (0 and 1: first and second half).
PARTS: dict[str, tuple[tuple[str, int | None], ...]] = {
    **dict.fromkeys(("w1", "gate_proj"), (("gate_up_proj", 0),)),
    "w3": (("gate_up_proj", 1),),
    "up_proj": (("gate_up_proj", 1), ("up_proj", None)),
    **dict.fromkeys(("w2", "down_proj"), (("down_proj", None),)),
}
SPELLED = (
    (re.compile(r"\.block_sparse_moe\.input_linear\.weight$"), ".mlp.experts.gate_up_proj"),
    (re.compile(r"\.block_sparse_moe\.output_linear\.weight$"), ".mlp.experts.down_proj"),
    (re.compile(r"\.block_sparse_moe\.router\.layer\b"), ".mlp.router"),
    (re.compile(r"\.experts\.fc1\.weight$"), ".experts.gate_up_proj"),
    (re.compile(r"\.experts\.fc2\.weight$"), ".experts.down_proj"),
    (re.compile(r"\.block_sparse_moe\b"), ".mlp"),
)
Spot = tuple[str, "int | None", "int | None"]  # a stored tensor, the expert that it is of a stack, and the half of that one's rows


@dataclass(frozen=True)
class Piece:
    """What a module changes of one stored matrix."""

    module: Module
    which: str = ""  # "[e]": expert e of a stored stack, "": all that is stored
    expert: int | None = None  # of the module's stack
    half: int | None = None  # of its rows

    def b(self, whole: Tensor) -> Tensor:
        """Its part (out, r) of the module's B, or of what is laid out as it; a view."""
        if self.expert is None:
            return whole
        rows = apart(self.module, whole)[self.expert]
        return rows if self.half is None else rows.tensor_split(2)[self.half]

    def a(self, whole: Tensor) -> Tensor:
        """Its part (r, in) of the module's A; a view."""
        return whole if self.expert is None else apart_a(self.module, whole)[self.expert]


def pieces(modules: Mapping[str, Module], names: Collection[str]) -> dict[str, list[Piece]]:
    """What is changed of each of `names` (of a checkpoint); modules of which nothing is found there are left out.

    Raises ResafeError for a stack of which only a part is found, and for two modules that change the same.
    """
    places: dict[str, list[Spot]] = {n: [(n, None, None)] for n in names}
    for name in names:
        for weight, expert, half in _running(name):
            places.setdefault(weight, []).append((name, expert, half))
    wanted = {w if w in places else _spelled(w): m for w, m in modules.items()}
    found: dict[str, list[Piece]] = {}
    for weight, there in translate(wanted, places).items():
        for name, made in _of(wanted[weight], places[there]):
            found.setdefault(name, []).append(made)
    for name, each in found.items():
        if len({piece.module.weight for piece in each}) > 1:
            raise ResafeError(f"the adapter changes {name} twice, as {each[0].module.weight} and as {each[-1].module.weight}: merge it into its base with PEFT.")
    return found


def adapted(found: Mapping[str, list[Piece]]) -> set[str]:
    """The names of the modules' weights in `pieces`."""
    return {piece.module.weight for each in found.values() for piece in each}


def stored_pieces(model: Checkpoint, update: Adapter) -> tuple[dict[str, list[Piece]], dict[str, tuple[str, Piece]]]:
    """What `update` changes of each tensor of its base; and heads that it adapts and the base leaves out, with the tensor that serves as such.

    Raises ResafeError where the base has no tensor for a weight that is adapted.
    """
    found, heads = pieces(update.modules, model.names()), dict[str, tuple[str, Piece]]()
    for name in sorted(update.modules.keys() - adapted(found)):
        source = model.head or model.embedding
        if not is_head(name) or source is None:
            raise ResafeError(f"{model.folder} has no tensor {name}, which {update.folder} adapts: is this its base, and are its experts stored in the same form?")
        heads[name] = (source, Piece(update.modules[name]))
    return found, heads


def check_shapes(model: Checkpoint, update: Adapter) -> None:
    """Refuse an adapter whose updates have not the shapes of its base's weights, laid out either way; packed weights are not judged."""
    for name, each in pieces(update.modules, model.names()).items():
        piece, shape = each[0], model.shape(name)
        rows, columns = update.shape(piece.module.b)[0], update.shape(piece.module.a)[1]
        ours = (rows if piece.half is None else rows // 2, columns)
        if model.floating(name) and (sorted(ours) != sorted(shape[-2:]) or (piece.which and len(each) != shape[0])):
            stack = [len(each)] if piece.which else []
            raise ResafeError(
                f"{piece.module.weight.removesuffix('.weight')} has shape {list(shape)} in {model.folder} and {[*stack, *ours]} in {update.folder}: "
                "the adapter is of another model."
            )


def _of(module: Module, spots: list[Spot]) -> Iterator[tuple[str, Piece]]:
    if module.experts is None:
        yield spots[0][0], Piece(module)
        return
    numbers = range(module.experts)
    if whole := [name for name, expert, _ in spots if expert is None]:
        yield from ((whole[0], Piece(module, f"[{e}]", e)) for e in numbers)
        return
    if sorted({spot[1:] for spot in spots}) not in ([(e, None) for e in numbers], [(e, h) for e in numbers for h in (0, 1)]):
        raise ResafeError(f"{module.weight} has {module.experts} experts in the adapter, and other ones in the checkpoint: is this its base?")
    yield from ((name, Piece(module, "", expert, half)) for name, expert, half in spots)


def _running(name: str) -> Iterator[Spot]:
    """The weights of the running model that a stored tensor may be, or be a part of, where that is not its own name."""
    if found := SINGLE.match(name):
        for stack, half in PARTS.get(found["part"], ()):
            yield f"{_spelled(found['experts'])}.{stack}", int(found["number"]), half
    if (spelled := _spelled(name)) != name:
        yield spelled, None, None


def _spelled(name: str) -> str:
    for stored, running in SPELLED:
        name = stored.sub(running, name)
    return name


def changed(model: Checkpoint, update: Adapter, found: Sequence[Piece], weight: Tensor) -> Tensor:
    """dW of one stored tensor, laid out as its value `weight`; shapes decide, and the architecture where matrices are square."""
    import torch

    module = found[0].module
    b, a = update.factors(module)
    made = [module.scale * (piece.b(b) @ piece.a(a)) for piece in found]
    delta = torch.stack(made) if found[0].which else made[0].T if module.embedding else made[0]
    fits, turned = delta.shape == weight.shape, delta.mT.shape == weight.shape
    if not (fits or turned):
        raise ResafeError(
            f"{module.weight.removesuffix('.weight')} has shape {list(weight.shape)} in {model.folder} and {list(delta.shape)} in {update.folder}: "
            "the adapter is of another model."
        )
    if fits and turned and not (module.embedding or module.vocabulary):
        return delta.mT if _in_out(model, update, module) else delta
    return delta if fits else delta.mT


def _in_out(model: Checkpoint, update: Adapter, module: Module) -> bool:
    kind = model.config.get("model_type")
    return kind in TURNED if module.experts else kind in CONV1D or bool(update.config.get("fan_in_fan_out"))
