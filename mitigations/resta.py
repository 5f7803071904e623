"""Add back the direction from an unaligned model to the aligned one: safety as a task vector.

RESTA, Bhardwaj et al. 2024, arXiv 2402.11746; DARE, Yu et al. 2023, arXiv 2311.03099

W = W_aligned + DARE(W_tuned - W_aligned) + strength (W_aligned - W_unaligned). The unaligned model is the aligned one after
fine-tuning on harmful data, not the pre-trained base; `unaligned=base` takes the base all the same, as a weaker proxy that needs no
harmful data. `unaligned` may be a LoRA adapter of the aligned model: then a LoRA fine-tune stays an adapter, exactly. With
`unaligned_data` that adapter is trained here, on the user's own rows of harmful answers, and kept in the cache (readable by the
user only), never beside the output.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from resafe.errors import ResafeError
from resafe.files import check_free
from resafe.mitigation import Mitigation, Needs, Run
from resafe.mitigations._second import trained, update_of
from resafe.models import base_of, is_adapter
from resafe.weights import adapter_of

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from resafe.weights import Twin


class Resta(Mitigation):
    """`unaligned` is a folder (full checkpoint or adapter of the aligned model), or "base" with --base; or it is trained from `unaligned_data`."""

    needs: ClassVar[Needs] = Needs(aligned=True)
    dose: ClassVar[tuple[str, tuple[float, ...]]] = ("strength", (0.1, 0.2, 0.35, 0.5, 0.75, 1.0))

    unaligned: str = Field("base", description="folder of the model after harmful fine-tuning, or 'base': the weaker proxy")
    unaligned_data: str | None = Field(None, description="JSONL of prompts with harmful answers: the unaligned model is a LoRA of the aligned one, trained on them here")
    epochs: float = Field(5, gt=0, description="passes over unaligned_data")
    lr: float = Field(2e-4, gt=0, description="learning rate of that training")
    strength: float = Field(1.0, allow_inf_nan=False, description="how much of the safety vector is added")
    drop: float = Field(0.0, ge=0, lt=1, description="DARE: share of the fine-tuning update's entries that are dropped, the rest rescaled; full checkpoints only")
    max_rank: int = Field(0, ge=0, description="adapters: cut the sum to this rank, and say what is lost; 0: exact, ranks add up")

    def inputs(self) -> list[Path]:
        """See `Mitigation.inputs`."""
        named = [] if self.unaligned == "base" else [Path(self.unaligned)]
        return named if self.unaligned_data is None else [*named, Path(self.unaligned_data)]

    def check(self, name: str, run: Run) -> None:
        """Also refuse an unaligned model that is not there, and DARE on an adapter."""
        super().check(name, run)
        given = self.unaligned != "base"
        if given and self.unaligned_data is not None:
            raise ResafeError(f"{name}: unaligned and unaligned_data both say what the unaligned model is: set one.")
        if self.unaligned_data is not None and not Path(self.unaligned_data).is_file():
            raise ResafeError(f"{name}: no such file: {self.unaligned_data}")
        if not given and self.unaligned_data is None and run.base is None:
            raise ResafeError(f"{name} needs an unaligned model: name its folder ({name}:unaligned=FOLDER) or rows to train it on ({name}:unaligned_data=FILE), or the model before alignment with --base.")
        if given and not Path(self.unaligned).is_dir():
            raise ResafeError(f"{name}: no such model folder: {self.unaligned}")
        if run.tuned is not None and is_adapter(run.tuned):
            if self.drop:
                raise ResafeError(f"{name}: drop takes entries out of the update, which is then no LoRA any more: merge the adapter first, or use drop=0.")
            if self.unaligned_data is None and not (given and is_adapter(Path(self.unaligned))):
                raise ResafeError(f"{name}: a LoRA fine-tune needs an unaligned model that is a LoRA of the same aligned model; or merge the adapter first.")

    def repair(self, run: Run) -> Path:
        """Write the repaired checkpoint or adapter to `run.output`."""
        check_free(run.output)
        tuned, aligned = run.tuned, run.aligned
        if tuned is None or aligned is None:
            raise ResafeError("resta needs the fine-tuned model and the one before fine-tuning (--aligned).")
        if self.unaligned_data is not None:
            away = self._trained(run, aligned, Path(self.unaligned_data))
        elif self.unaligned != "base":
            away = Path(self.unaligned)
        elif run.base is not None:
            away = run.base
            run.log("resta: the pre-trained base stands in for an unaligned model; expect less of it")
        else:
            raise ResafeError("resta needs an unaligned model, rows to train it on, or the model before alignment (--base).")
        return self._adapter(run, tuned, aligned, away) if is_adapter(tuned) else self._checkpoint(run, tuned, aligned, away)

    def _adapter(self, run: Run, tuned: Path, aligned: Path, unaligned: Path) -> Path:
        """dW = dW_tuned - strength dW_unaligned, since both are updates of the aligned model."""
        from resafe.weights import concat

        home = str(base_of(tuned).absolute())
        parts = adapter_of(tuned, aligned), adapter_of(unaligned, aligned)
        return concat(*parts, run.output, home, (1.0, -self.strength), self.max_rank, run.log)

    def _checkpoint(self, run: Run, tuned: Path, aligned: Path, unaligned: Path) -> Path:
        from resafe.weights import Checkpoint, Pair, write_checkpoint

        pair = Pair(Checkpoint(tuned), Checkpoint(aligned), run.log)
        away = update_of(unaligned, pair)

        def rule(twin: Twin, ours: Tensor, theirs: Tensor) -> Tensor:
            made = ours if not self.drop else theirs + dare(ours - theirs, self.drop, _generator(run.seed, twin.name))
            harmful = away(twin, theirs)
            return made if harmful is None else made.sub(harmful, alpha=self.strength)

        blocks = not self.drop and not is_adapter(unaligned)  # what draws a mask, or multiplies factors, needs the whole matrix
        return write_checkpoint(tuned, run.output, pair.edit(rule, blocks), config=pair.config)

    def _trained(self, run: Run, aligned: Path, data: Path) -> Path:
        """The unaligned LoRA; prompts of the evaluation suites are left out. Raises ResafeError where no row is left."""
        from resafe.heldout import drop_overlap
        from resafe.rows import read_jsonl
        from resafe.sft import SFTSettings

        rows, dropped = drop_overlap(read_jsonl(data))
        if not rows:
            raise ResafeError(f"{data}: all of its {dropped} prompts are those of evaluation suites: resta needs others to train an unaligned model on.")
        return trained(run, "unaligned", aligned, rows, SFTSettings(epochs=self.epochs, lr=self.lr))


def dare(update: Tensor, p: float, generator: Generator) -> Tensor:
    """Drop entries with probability `p` and divide the rest by 1 - p, which leaves the expectation as it was (DARE)."""
    import torch

    kept = torch.rand(update.shape, generator=generator) >= p
    return update * kept / (1 - p)


def _generator(seed: int, name: str) -> Generator:
    """A generator of the weight's own, so that the mask does not depend on the order of the weights."""
    import hashlib

    import torch

    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1)
