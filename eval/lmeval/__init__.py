"""Standard utility suites by lm-evaluation-harness, https://github.com/EleutherAI/lm-evaluation-harness

It runs in a process of its own and is never imported; its per-sample verdicts become `Items`, so that two models are
compared in pairs, prompt by prompt. Never with its `--use_cache`, whose key does not hold the model.
"""

from __future__ import annotations

from resafe.eval.lmeval._run import Setup, measure, run
from resafe.eval.lmeval._samples import Measured, add, import_results, import_samples

__all__ = ["Measured", "Setup", "add", "import_results", "import_samples", "measure", "run"]
