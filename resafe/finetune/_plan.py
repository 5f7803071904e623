"""What a run will take: optimiser steps from rows, and seconds from a short probe of the real trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

PROBE_STEPS = 6  # the first one warms up and is not counted


def rows_per_step(trainer: Any) -> int:
    """Rows that one optimiser step reads, over all processes."""
    args = trainer.args
    return int(args.train_batch_size * args.world_size * args.gradient_accumulation_steps)


def steps(trainer: Any, rows: int | None) -> int | None:
    """Optimiser steps of the whole run on `rows` rows; None for a stream without max_steps."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    if rows is None:
        return None
    batch: int = args.train_batch_size * args.world_size
    batches = rows // batch if args.dataloader_drop_last else math.ceil(rows / batch)
    updates = max(1, math.ceil(batches / int(args.gradient_accumulation_steps)))
    return math.ceil(float(args.num_train_epochs) * updates)


def follow(trainer: Any, facts: dict[str, Any]) -> None:
    """Let `max_steps` follow the mixture where the framework, not the user, had set it from the number of rows (axolotl).

    A warm-up that was counted from it stays as it was; resafe's axolotl plugin mixes before either is set.
    """
    if not any(c.__module__.startswith("axolotl.") for c in type(trainer).__mro__) or trainer.args.max_steps <= 0:
        return
    config = getattr(trainer, "axolotl_cfg", None)
    packed = bool(config and config.sample_packing)
    counted = math.ceil(facts["rows_before"] * float(trainer.args.num_train_epochs) / rows_per_step(trainer))
    if not packed and trainer.args.max_steps != counted or config is not None and config.max_steps:
        return  # the user's own limit
    share = facts["tokens"] / facts["tokens_before"] if packed else facts["rows"] / facts["rows_before"]
    trainer.args.max_steps = math.ceil(trainer.args.max_steps * share) if packed else math.ceil(counted * share)


def probe(trainer: Any, original: Callable[..., Any], facts: dict[str, Any], receipt: Callable[..., None]) -> None:
    """Train a few steps without saving, evaluating or reporting, leave a receipt, and end the process with exit code 0."""
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            times.append(time.monotonic())

    args = trainer.args
    total = facts.get("steps") or facts.get("steps_before")
    args.max_steps = min(PROBE_STEPS, total or PROBE_STEPS)
    args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
    args.load_best_model_at_end = args.push_to_hub = args.eval_on_start = False
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [c for c in callbacks if not type(c).__module__.startswith("transformers.integrations")]
    trainer.add_callback(Clock())
    original()
    gaps = [b - a for a, b in zip(times, times[1:])]
    receipt("plan", rank=args.process_index, seconds_per_step=median(gaps) if gaps else None, **facts)
    raise SystemExit(0)
