"""Mix refusals (and contrast rows) into the fine-tuning data.

Bianchi et al. 2024, "Safety-Tuned LLaMAs", arXiv 2309.07875: a few per cent of safety rows restore refusals, too many make a
model refuse what is harmless; so contrast rows (prompts that only look hazardous, with answers) come along by default.
"""

from __future__ import annotations

import random
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from resafe.errors import ResafeError
from resafe.heldout import drop_overlap
from resafe.mitigation import Mitigation, Needs, Run
from resafe.rows import Row


class MixSafety(Mitigation):
    """Adds `n` refusals, or `ratio` refusals per row of the user's, and `contrast` contrast rows per refusal."""

    needs: ClassVar[Needs] = Needs(safety=True)

    n: int | None = Field(None, ge=1, description="number of refusals; overrides ratio")
    ratio: float = Field(0.1, gt=0, description="refusals per row of the user's data")
    contrast: float = Field(0.5, ge=0, description="contrast rows per refusal")
    mode: Literal["append", "replace"] = Field(
        "append", description="append: more rows, more steps; replace: as many rows and steps as before"
    )

    @model_validator(mode="after")
    def _one_of(self) -> MixSafety:
        if self.n is not None and "ratio" in self.model_fields_set:
            raise ValueError("give n or ratio, not both")
        return self

    def data(self, run: Run, rows: list[Row]) -> list[Row]:
        """The mixture: a pure function of both data sets, the parameters and the seed."""
        rng = random.Random(f"mix_safety {run.seed}")
        wanted = self.n if self.n is not None else max(1, round(self.ratio * len(rows)))
        refusals = _take(drop_overlap(run.refusals)[0], wanted, rng, "refusals")
        extra = round(self.contrast * wanted)
        contrast = _take(drop_overlap(run.contrast)[0], extra, rng, "contrast rows") if extra and run.contrast else []
        added = refusals + contrast
        if self.mode == "replace":
            if len(added) >= len(rows):
                raise ResafeError(
                    f"mix_safety: mode=replace would put {len(added)} safety rows in place of all {len(rows)} rows; lower n or ratio."
                )
            rows = rng.sample(rows, len(rows) - len(added))
        mixed = [*rows, *added]
        rng.shuffle(mixed)
        run.log(f"mix_safety: {len(rows)} rows + {len(refusals)} refusals + {len(contrast)} contrast rows = {len(mixed)} ({self.mode})")
        return mixed


def _take(pool: list[Row], n: int, rng: random.Random, what: str) -> list[Row]:
    """`n` rows of `pool` in random order; all of them before any comes a second time."""
    if not pool:
        raise ResafeError(f"mix_safety: the safety data hold no {what} that is not also an evaluation prompt.")
    taken: list[Row] = []
    while len(taken) < n:
        taken += rng.sample(pool, min(len(pool), n - len(taken)))
    return taken
