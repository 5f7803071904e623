"""resafe: re-apply safety to language models after fine-tuning, and measure it honestly.

The verbs: `train`, `repair`, `attach` (mitigations onto a Trainer, before its `train()`), `mix_file` (the command `resafe mix`),
`evaluate` (the command `resafe eval`) and `compare`, which pairs the targets of one evaluation (the command of that name also
runs the evaluation).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resafe.eval.comparison import compare
    from resafe.eval.evaluation import evaluate
    from resafe.finetune.mix import mix_file
    from resafe.finetune.repair import repair
    from resafe.finetune.session import attach
    from resafe.finetune.train import train

_HOMES = {
    "train": "resafe.finetune.train",
    "repair": "resafe.finetune.repair",
    "attach": "resafe.finetune.session",
    "mix_file": "resafe.finetune.mix",
    "evaluate": "resafe.eval.evaluation",
    "compare": "resafe.eval.comparison",
}
__all__ = ["attach", "compare", "evaluate", "mix_file", "repair", "train"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import resafe` and `resafe --help` stay fast."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'resafe' has no attribute {name!r}")
