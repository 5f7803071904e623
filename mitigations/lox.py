"""Extrapolate along the main directions in which alignment moved the weights.

LoX, Perin et al. 2025, arXiv 2506.15606

W' = W + strength SVD_k(W_aligned - W_base), the best approximation of rank k of every linear weight's change. Given the aligned
model itself as the one to repair, this is the paper's method: a model that fine-tuning breaks less. Given a fine-tune, it
adds the direction of alignment to it (task arithmetic). Needs no data and no training.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from resafe.files import check_free
from resafe.mitigation import Mitigation, Needs, Run
from resafe.mitigations._calibrated import as_full
from resafe.mitigations._updates import fingerprints

if TYPE_CHECKING:
    from torch import Tensor

    from resafe.weights import Twin


class Lox(Mitigation):
    """Writes a full checkpoint: a LoRA is merged into its base first, since weights that it does not adapt move too."""

    needs: ClassVar[Needs] = Needs(base=True, aligned=True, quantised=False, makes_full=True)
    dose: ClassVar[tuple[str, tuple[float, ...]]] = ("strength", (0.1, 0.25, 0.5, 0.75, 1.0, 1.25))

    rank: int = Field(6, ge=0, description="k, directions per weight; 0 takes all of them")
    strength: float = Field(1.25, allow_inf_nan=False, description="how far to extrapolate")

    def repair(self, run: Run) -> Path:
        """Write the extrapolated checkpoint to `run.output`; embeddings, heads and 1-D tensors stay as they are."""
        from resafe.weights import Checkpoint, Pair, write_checkpoint
        from resafe.weights.alignment import Alignment
        from resafe.weights.subspace import low_rank

        check_free(run.output)
        tuned, aligned, base = fingerprints(run, "lox")
        alignment = Alignment(aligned, base)
        matrices = set(alignment.matrices())

        def rule(twin: Twin, ours: Tensor, theirs: Tensor) -> Tensor:
            if twin.aligned not in matrices or (v := alignment.direction(twin.aligned)) is None:
                return ours
            step = self.strength * (low_rank(v, self.rank) if self.rank else v)
            return ours + (step.T if alignment.turned(twin.aligned) else step)

        with as_full(run, "lox", tuned, aligned) as full:
            pair = Pair(Checkpoint(full), alignment.aligned, run.log)
            return write_checkpoint(full, run.output, pair.edit(rule), config=pair.config)
