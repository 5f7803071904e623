"""Missing verdicts, filled as badly and as well as they can be: what a number would be if they had been given."""

from __future__ import annotations

from collections.abc import Sequence

from resafe.eval.stats._common import Interval, check_paired


def bounds(k: int, n_scored: int, n: int) -> Interval:
    """The rate if every missing verdict were a no, and if every one were a yes."""
    return (k / n, (k + n - n_scored) / n) if n else (0.0, 1.0)


def bounds_mean(values: Sequence[float | None], lo: float = 0.0, hi: float = 1.0) -> Interval:
    """The mean if every missing value (None) were the lowest, and if every one were the highest of the scale."""
    if not values:
        return lo, hi
    total, missing = sum(float(v) for v in values if v is not None), sum(v is None for v in values)
    return (total + missing * lo) / len(values), (total + missing * hi) / len(values)


def bounds_difference(
    before: Sequence[float | None], after: Sequence[float | None], lo: float = 0.0, hi: float = 1.0
) -> Interval:
    """Smallest and largest mean after - mean before when missing values (None) are filled against and in favour of it.

    Every prompt counts, also those that neither side was scored on. Give only the prompts that the metric is about: a
    value that is None because it was not asked for is not missing.
    """
    check_paired(before, after)
    (b_low, b_high), (a_low, a_high) = bounds_mean(before, lo, hi), bounds_mean(after, lo, hi)
    return a_low - b_high, a_high - b_low


def crosses(limits: Interval, at: float = 0.0) -> bool:
    """Whether limits of a difference leave open which side is ahead; then no winner may be named.

    For `bounds_difference` and for intervals alike; limits that only touch `at` leave it open, too.
    """
    low, high = limits
    return low <= at <= high
