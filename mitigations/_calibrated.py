"""What the repairs that look at activations or gradients share: a full checkpoint to edit, rows to look at, weights by name."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.files import scratch
from resafe.mitigation import Run
from resafe.models import is_adapter
from resafe.weights import adapter_of

if TYPE_CHECKING:
    from resafe.models import Loaded


def two_models(run: Run, name: str) -> tuple[Path, Path]:
    """(tuned, aligned) folders. Raises ResafeError if one is not named."""
    if run.tuned is None or run.aligned is None:
        raise ResafeError(f"{name} needs the fine-tuned model and the one before fine-tuning (--aligned).")
    return run.tuned, run.aligned


@contextmanager
def as_full(run: Run, name: str, tuned: Path, base: Path) -> Iterator[Path]:
    """`tuned` as a full checkpoint: itself, or a LoRA merged into `base` for as long as the block runs.

    Editing single entries of W takes an update out of the reach of its rank, so that the result is no adapter any more.
    """
    if not is_adapter(tuned):
        yield tuned
        return
    from resafe.weights import merge_into
    from resafe.weights.writer import TOKENS, copy_beside

    adapter_of(tuned, base)
    run.log(f"{name}: the LoRA is merged into its base; the result is a full checkpoint")
    with scratch(run.output, "merged") as tmp:
        merged = merge_into(base, tuned, tmp / "merged")
        copy_beside(tuned, merged, TOKENS)  # what the adapter was trained with
        yield merged


def sampled(rows: list[Any], n: int, run: Run, name: str) -> list[Any]:
    """At most `n` of `rows`, the same ones for the same seed."""
    return random.Random(f"{name} {run.seed}").sample(rows, min(n, len(rows)))


def by_module(loaded: Loaded, stored: Collection[str], names: Collection[str]) -> dict[str, str]:
    """Name in a checkpoint -> name in the loaded model, of the linear weights `names`. Raises ResafeError where one is missing."""
    from resafe.weights import translate

    there = translate(names, stored)
    if lost := [n for n in names if n not in there]:
        raise ResafeError(f"{loaded.folder} stores no tensor for {lost[0]}: this architecture is not supported.")
    return {stored_name: name for name, stored_name in there.items()}
