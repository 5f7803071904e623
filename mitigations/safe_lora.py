"""Project the fine-tuning update onto the directions of alignment, in the layers where it leaves them.

Safe LoRA, Hsu et al. 2024, arXiv 2405.16833

With V = W_aligned - W_base, `mode=official` is the paper's C = V V^T / ||V||_F and its test cos(C dW, dW) <= threshold; C is
no projector: where V is small, C dW is next to nothing, so that layers are dropped rather than projected. `mode=orthogonal` (default)
takes P = U U^T with the top `rank` left singular vectors of V instead. No d x d matrix is formed in either mode: C B = V (V^T B) / ||V||.
A LoRA adapter stays one (only B changes, which works over a 4-bit base); in a full checkpoint W - W_aligned is projected.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from resafe.errors import ResafeError
from resafe.files import check_free
from resafe.mitigation import Mitigation, Needs, Run
from resafe.mitigations._updates import Decision, apply_to_adapter, apply_to_checkpoint, decide, fingerprints

if TYPE_CHECKING:
    from resafe.weights.subspace import Official, Orthogonal


class SafeLora(Mitigation):
    """Keeps layers whose update lies in the directions of alignment, and projects (or drops) the others."""

    needs: ClassVar[Needs] = Needs(base=True, aligned=True)
    dose: ClassVar[tuple[str, tuple[float, ...]]] = ("threshold", (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0))

    mode: Literal["orthogonal", "official"] = Field("orthogonal", description="a true projector, or the paper's matrix")
    rank: int = Field(32, ge=1, description="orthogonal: directions of alignment that are kept, at most half of a weight's size")
    threshold: float = Field(0.5, description="project layers whose score is at most this; orthogonal scores count from what chance gives")
    number: int | None = Field(None, ge=1, description="project this many layers, those of the smallest scores, instead of using the threshold")
    action: Literal["project", "drop"] = Field("project", description="drop: take the update of the chosen layers away altogether (SPLoRA)")

    def repair(self, run: Run) -> Path:
        """Write the repaired checkpoint or adapter to `run.output`, with the scores in safe_lora.json."""
        check_free(run.output)
        tuned, aligned, base = fingerprints(run, "safe_lora")
        scores = decide(run, tuned, aligned, base, self._operator, self._score)
        chosen = self._chosen(scores)
        run.log(f"safe_lora: {len(chosen)} of {len(scores)} weights leave the directions of alignment; {self.action}")
        operator: Callable[[Any], Any] = (lambda _: None) if self.action == "drop" else self._operator
        write = apply_to_adapter if (tuned / "adapter_config.json").is_file() else apply_to_checkpoint
        about = {**self.model_dump(), "scores": [{**d.facts, "changed": d.name in chosen} for d in scores]}
        return write(run, tuned, aligned, base, chosen, operator, "safe_lora.json", about)

    def _operator(self, v: Any) -> Orthogonal | Official:
        from resafe.weights.subspace import Official, Orthogonal, top_left

        return Official(v) if self.mode == "official" else Orthogonal(top_left(v, min(self.rank, *(max(1, n // 2) for n in v.shape))))

    def _score(self, operator: Any, cosine: float) -> float:
        """The paper's cosine, rounded as there; or the share of the update that P keeps, 0 being what a random update keeps and 1 all."""
        if self.mode == "official":
            return round(cosine, 5)
        null: float = operator.null
        return (cosine - null) / (1 - null)

    def _chosen(self, scores: list[Decision]) -> set[str]:
        limit = self.threshold
        if self.number is not None:
            if self.number > len(scores):
                raise ResafeError(f"safe_lora: number={self.number}, but only {len(scores)} weights were updated.")
            limit = sorted(d.score for d in scores)[self.number - 1]
        return {d.name for d in scores if d.score <= limit}
