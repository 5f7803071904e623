"""Mix refusals (and contrast rows) into the fine-tuning data.

Bianchi et al. 2024, "Safety-Tuned LLaMAs", arXiv 2309.07875: a few per cent of safety rows restore refusals, too many make a
model refuse what is harmless; so contrast rows (prompts that only look hazardous, with answers) come along by default.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from resafe.errors import ResafeError
from resafe.heldout import drop_overlap
from resafe.mitigation import Mitigation, Needs, Run
from resafe.rows import Row


class MixSafety(Mitigation):
    """Adds `n` refusals, or `ratio` refusals per row of the user's, and `contrast` contrast rows per refusal."""

    needs: ClassVar[Needs] = Needs(safety=True, stream=True)

    n: int | None = Field(None, ge=1, description="number of refusals; overrides ratio")
    ratio: float = Field(0.1, gt=0, description="refusals per row of the user's data")
    contrast: float = Field(0.5, ge=0, description="contrast rows per refusal")
    mode: Literal["append", "replace"] = Field(
        "append", description="append: more rows, more steps; replace: as many rows, steps and, where lengths allow it, tokens as before"
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
            gone = _alike(rows, added, rng)
            rows = [row for i, row in enumerate(rows) if i not in gone]
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


def _alike(rows: list[Row], added: list[Row], rng: random.Random) -> set[int]:
    """As many indexes of `rows` as there are `added` rows, chosen so that their lengths add up alike.

    For each added row the row of the nearest length goes, what earlier choices were off by included; ties are random.
    """
    left = sorted((_length(row), rng.random(), i) for i, row in enumerate(rows))
    gone, owed = set(), 0
    for wanted in rng.sample([_length(row) for row in added], len(added)):
        owed += wanted
        at = bisect_left(left, (owed, rng.random(), 0))
        near = min((k for k in (at - 1, at) if 0 <= k < len(left)), key=lambda k: abs(left[k][0] - owed))
        length, _, index = left.pop(near)
        owed -= length
        gone.add(index)
    return gone


def _length(row: Row) -> int:
    """Characters of a row's texts; tokenizers differ, proportions hardly do. 0 for a row of a stream, not read yet."""
    return sum(len(m["content"]) for m in row.get("messages", ()))
