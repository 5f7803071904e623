"""Judge every answer before it is shown, and replace a harmful one by a refusal.

Llama Guard, Inan et al. 2023, arXiv 2312.06674, for the idea of one classifier of whole exchanges. Fails closed: what the guard
cannot score is replaced too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from resafe.guards.filter import OutputFilter
from resafe.mitigation import Mitigation, Run

REFUSAL = "I'm sorry, but I can't help with that."


class FilterOutput(Mitigation):
    """Serves a model behind a guard; evaluation applies the same guard that the manifest names."""

    guard_model: str = Field(
        "offline", description="offline | a fitted guard file | a guard model's folder | moderation | chat:MODEL@URL"
    )
    threshold: float | None = Field(None, ge=0, le=1, description="block from this P(harmful) on; default: the guard's own")
    refusal: str = Field(REFUSAL, min_length=1, description="what is shown instead")
    on_error: Literal["block", "allow"] = Field("block", description="what happens to answers that the guard cannot score")

    def guard(self, run: Run) -> OutputFilter:
        """The filter to put around the model; loading it here makes a missing guard fail before anything is served."""
        entry = self.model_dump()
        if Path(self.guard_model).exists():
            entry["guard_model"] = str(Path(self.guard_model).absolute())
        made = OutputFilter.from_entry(entry)
        made.entry["identity"] = made.identity
        return made
