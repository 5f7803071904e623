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
from typing import Any, ClassVar, Literal

from pydantic import Field

from resafe.files import check_free
from resafe.mitigation import Needs, Run
from resafe.mitigations._leaving import Leaving
from resafe.mitigations._updates import apply_to_adapter, apply_to_checkpoint, decide, fingerprints
from resafe.models import is_adapter


class SafeLora(Leaving):
    """Keeps layers whose update lies in the directions of alignment, and projects (or drops) the others."""

    needs: ClassVar[Needs] = Needs(base=True, aligned=True)
    dose: ClassVar[tuple[str, tuple[float, ...]]] = ("threshold", (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0))

    action: Literal["project", "drop"] = Field("project", description="drop: take the update of the chosen layers away altogether (SPLoRA)")

    def repair(self, run: Run) -> Path:
        """Write the repaired checkpoint or adapter to `run.output`, with the scores in safe_lora.json."""
        check_free(run.output)
        tuned, aligned, base = fingerprints(run, "safe_lora")
        scores = decide(run, tuned, aligned, base, self.operator, self.score)
        chosen = self.chosen("safe_lora", scores)
        run.log(f"safe_lora: {len(chosen)} of {len(scores)} weights leave the directions of alignment; {self.action}")
        operator: Callable[[Any], Any] = (lambda _: None) if self.action == "drop" else self.operator
        write = apply_to_adapter if is_adapter(tuned) else apply_to_checkpoint
        return write(run, tuned, aligned, base, chosen, operator, "safe_lora.json", self.record(scores, chosen))
