"""The contract of a mitigation: validated parameters, what it needs, and the hooks it overrides.

A mitigation is one file with one subclass of `Mitigation`. Its fields are its parameters; its public name is the file's
name; the module docstring's first line says what it does and an `arXiv` or DOI address in it names the paper.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from resafe.errors import ResafeError
from resafe.models import base_of, is_adapter, read_config
from resafe.rows import Row

if TYPE_CHECKING:
    from resafe.guards.filter import OutputFilter

HOOKS = ("prepare", "data", "params", "loss", "step", "repair", "guard")


@dataclass(frozen=True)
class Needs:
    """What must be at hand before any work starts, and what a method can be applied to."""

    base: bool = False  # the model before alignment
    aligned: bool = False  # the model before fine-tuning
    safety: bool = False  # safety rows (refusals; contrast rows where they are offered)
    lora: bool = True
    full: bool = True
    quantised: bool = True  # a base that is already stored in 4 or 8 bits
    makes_full: bool = False  # what a repair makes of a LoRA is a full checkpoint
    stream: bool = False  # the data hook asks how many rows there are, not what they say, so a stream of rows will do


@dataclass
class Run:
    """One fine-tuning run, and everything a hook may look at. Models are local folders."""

    output: Path
    seed: int = 0
    base: Path | None = None  # before alignment
    aligned: Path | None = None  # what the user started from
    tuned: Path | None = None  # what training produced: a full checkpoint or a LoRA adapter
    task: list[Row] = field(default_factory=list)  # the user's own rows
    refusals: list[Row] = field(default_factory=list)  # hazardous prompts with refusals
    contrast: list[Row] = field(default_factory=list)  # prompts that look hazardous and are not, with answers
    tokenizer: Any = None  # during training: what the trainer tokenises with
    measure: Callable[[Path], float] | None = None  # utility of a checkpoint folder on held-out rows, in [0, 1]
    log: Callable[[str], None] = lambda _: None


class Mitigation(BaseModel):
    """Base of every defence. Every hook does nothing; override the one or two that the method needs."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    needs: ClassVar[Needs] = Needs()
    dose: ClassVar[tuple[str, tuple[float, ...]] | None] = None  # the parameter that says how much, and values to try, weakest first

    def inputs(self) -> list[Path]:
        """Files and model folders that parameters name: what they hold decides the result too."""
        return []

    def prepare(self, run: Run) -> None:
        """Once, before training: statistics, reference values, checks."""

    def data(self, run: Run, rows: list[Row]) -> list[Row]:
        """Before tokenising: the rows to train on instead of `rows`."""
        return rows

    def params(self, run: Run, model: Any) -> None:
        """Model built, optimiser not yet: freeze, initialise, mask. Changes `model` in place."""

    def loss(self, run: Run, model: Any, batch: Any, outputs: Any) -> dict[str, Any]:
        """Each batch of training: named scalar tensors to add to the loss, each a mean over the batch.

        `model` is the bare model (no DDP around it), `batch` its inputs, `outputs` what its forward pass returned, with
        gradients. Some trainers (TRL's) use a fused head, whose outputs hold log-probabilities and no logits.
        """
        return {}

    def step(self, run: Run, backward: Callable[..., Any]) -> Any:
        """Each optimiser step: the gradients to use, as `{parameter name: tensor}`; at most one mitigation of a stack may own it.

        `backward(stream="task", perturb=None, hooks=None)` runs the loss of this step's batches ("task") or of as many
        batches of safety rows ("safety") forward and back, and returns the gradients of all trainable parameters by name.
        `perturb` is added to the named parameters during the pass and taken off again; `hooks` are forward hooks by
        module name, in place during the pass.
        """

    def repair(self, run: Run) -> Path:
        """After training, on the saved folder `run.tuned`: write a repaired checkpoint to `run.output`; return it."""
        raise NotImplementedError

    def guard(self, run: Run) -> OutputFilter | None:
        """Serving and evaluation: the filter to put around the model."""
        return None

    @classmethod
    def hooks(cls) -> tuple[str, ...]:
        """Names of the hooks that this method overrides, in the order in which they act."""
        return tuple(h for h in HOOKS if getattr(cls, h) is not getattr(Mitigation, h))

    @classmethod
    def stage(cls) -> str:
        """The hook that gives the method its place: the first that is not `prepare`."""
        return next((h for h in cls.hooks() if h != "prepare"), "prepare")

    @classmethod
    def title(cls) -> str:
        """First line of the module docstring."""
        return (inspect.getdoc(inspect.getmodule(cls)) or "").split("\n")[0]

    def check(self, name: str, run: Run) -> None:
        """Refuse, before any work, a run that lacks what this mitigation needs. Raises ResafeError."""
        if self.needs.aligned and run.aligned is None:
            raise ResafeError(f"{name} needs the model before fine-tuning: name its folder with --aligned.")
        if self.needs.base and run.base is None:
            raise ResafeError(f"{name} needs the model before alignment (the pre-trained base): name its folder with --base.")
        if self.needs.safety and not run.refusals:
            raise ResafeError(f"{name} needs safety rows: name a file with --safety-data, or leave the shipped pack on.")
        if run.tuned is not None:
            self._check_form(name, run.tuned)

    def _check_form(self, name: str, tuned: Path) -> None:
        """Refuse a form of checkpoint that the method cannot be applied to."""
        adapter = is_adapter(tuned)
        if not (self.needs.lora if adapter else self.needs.full):
            raise ResafeError(f"{name} does not work on {'a LoRA adapter' if adapter else 'a full checkpoint'} such as {tuned}.")
        home = base_of(tuned) if adapter else tuned
        if not self.needs.quantised and "quantization_config" in read_config(home / "config.json"):
            raise ResafeError(
                f"{name} does not work on weights stored in 4 or 8 bits ({home}): use the unquantised model, quantise the result again."
            )
