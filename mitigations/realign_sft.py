"""Re-align a finished fine-tune by supervised training on refusals, contrast rows and its own benign answers.

Plain sibling of `realign_dpo`, without a preference loss. Bianchi et al. 2024, arXiv 2309.07875, for refusals as rows;
self-distilled replay after Yang et al. 2024, arXiv 2402.13669.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resafe import models
from resafe.mitigation import Run
from resafe.mitigations._realign import Parts, Realigner
from resafe.sft import SFTSettings, sft


class RealignSFT(Realigner):
    """A new LoRA trained on the three kinds of rows with cross-entropy on the answers."""

    def train(self, run: Run, loaded: models.Loaded, parts: Parts, workdir: Path) -> Any:
        """See `Realigner.train`."""
        settings = SFTSettings(
            lora=True, rank=self.rank, alpha=2 * self.rank, lr=self.lr, epochs=self.epochs, batch=self.batch,
            max_length=self.max_length,
        )  # fmt: skip
        rows = [e.row for e in (*parts.refusals, *parts.contrast, *parts.replay)]
        return sft(loaded.model, loaded.tokenizer, rows, settings, workdir, run.seed, log=run.log)
