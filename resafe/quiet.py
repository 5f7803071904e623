"""Keep the libraries underneath from talking over the one progress line that users should see."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any


def quieten() -> None:
    """Silence progress bars, advice and deprecation warnings of transformers, datasets and TRL; errors still surface."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import transformers

    talk: Any = transformers.utils.logging
    talk.set_verbosity_error()
    talk.disable_progress_bar()
    for name in ("datasets", "trl", "peft", "accelerate", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(trl|peft|transformers|torch|accelerate)\b.*")
