"""Which weights an update moves out of the directions of alignment: the rule that Safe LoRA and SafeMERGE share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from resafe.errors import ResafeError
from resafe.mitigation import Mitigation
from resafe.mitigations._updates import Decision

if TYPE_CHECKING:
    from resafe.weights.subspace import Official, Orthogonal


class Leaving(Mitigation):
    """Weights are chosen whose score is at most `threshold`, or the `number` of the smallest scores (Safe LoRA, arXiv 2405.16833)."""

    mode: Literal["orthogonal", "official"] = Field("orthogonal", description="a true projector, or the paper's matrix")
    rank: int = Field(32, ge=1, description="orthogonal: directions of alignment that count, at most half of a weight's size")
    threshold: float = Field(0.5, allow_inf_nan=False, description="choose layers whose score is at most this; orthogonal scores count from what chance gives")
    number: int | None = Field(None, ge=1, description="choose this many layers, those of the smallest scores, instead of using the threshold")

    def operator(self, v: Any) -> Orthogonal | Official:
        """C of V (out, in)."""
        from resafe.weights.subspace import Official, Orthogonal, top_left

        return Official(v) if self.mode == "official" else Orthogonal(top_left(v, min(self.rank, *(max(1, n // 2) for n in v.shape))))

    def score(self, operator: Any, cosine: float) -> float:
        """The paper's cosine, rounded as there; or the share of the update that P keeps: 1 all, 0 what it keeps of a random update, -1 nothing."""
        if self.mode == "official":
            return round(cosine, 5)
        null: float = operator.null
        if null >= 1:  # P is the identity: a weight with one output
            return 1.0
        return (cosine - null) / (1 - null if cosine >= null else null)

    def chosen(self, name: str, scores: list[Decision]) -> set[str]:
        """Names of the weights that leave. Raises ResafeError where `number` is more than there are."""
        if self.number is None:
            return {d.name for d in scores if d.score <= self.threshold}
        if self.number > len(scores):
            raise ResafeError(f"{name}: number={self.number}, but only {len(scores)} weights were updated.")
        return {d.name for d in sorted(scores, key=lambda d: (d.score, d.name))[: self.number]}

    def record(self, scores: list[Decision], chosen: set[str]) -> dict[str, Any]:
        """What was decided, for the file beside the result."""
        return {**self.model_dump(mode="json"), "scores": [{**d.facts, "changed": d.name in chosen} for d in scores]}
