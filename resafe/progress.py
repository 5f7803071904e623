"""A trainer callback that says, at most every few seconds, how far training has come."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def progress_callback(log: Callable[[str], None], every: float = 5.0) -> Any:
    """A `transformers.TrainerCallback` that logs `step i/n, about m s left` through `log`."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        started = last = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started = self.last = time.monotonic()
            self.first = state.global_step

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            now = time.monotonic()
            if now - self.last < every and state.global_step != state.max_steps:
                return
            self.last = now
            done = state.global_step - self.first
            left = (now - self.started) / done * (state.max_steps - state.global_step)
            log(f"training: step {state.global_step}/{state.max_steps}, about {left:.0f} s left")

    return Progress()
