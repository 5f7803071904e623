"""What the other files share: the types, checked columns, and the score interval that most of them end in."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from resafe.errors import ResafeError

Interval = tuple[float, float]
Array = np.ndarray[Any, Any]


class Difference(NamedTuple):
    """after - before, with its interval."""

    difference: float
    low: float
    high: float


def upper_tail(level: float) -> float:
    """0.975 for an interval of 95 %. Raises ResafeError for a level outside (0, 1)."""
    if not 0 < level < 1:
        raise ResafeError(f"the level of an interval lies between 0 and 1; found {level}: write 95 % as 0.95.")
    return (1 + level) / 2


def normal_quantile(level: float) -> float:
    """z of a two-sided interval."""
    return float(stats.norm.ppf(upper_tail(level)))


def score_limits(p: Any, n: Any, z: float) -> tuple[Array, Array]:
    """Wilson's limits of shares p [...] of n [...] > 0 trials; p and n need not come from whole counts."""
    p, n = np.asarray(p, dtype=float), np.asarray(n, dtype=float)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return np.where(p <= 0, 0.0, centre - half), np.where(p >= 1, 1.0, centre + half)


def unit_column(values: Sequence[float], lo: float, hi: float) -> Array:
    """The values [n] moved from [lo, hi] to [0, 1]. Raises ResafeError for none, and for one outside."""
    if not lo < hi:
        raise ResafeError(f"a scale runs from a lower to a higher value; found {lo} to {hi}.")
    x = np.asarray(values, dtype=float)
    if not len(x):
        raise ResafeError("a mean needs at least one value: every verdict of this column is missing.")
    outside = x[~((x >= lo) & (x <= hi))]  # nan is outside, too
    if len(outside):
        raise ResafeError(f"{outside[0]:g} is outside the scale {lo:g} to {hi:g}.")
    unit: Array = (x - lo) / (hi - lo)
    return unit


def check_paired(before: Sized, after: Sized) -> None:
    """Raises ResafeError when two columns cannot be of the same prompts."""
    if len(before) != len(after):
        raise ResafeError(f"paired verdicts must be on the same prompts; found {len(before)} and {len(after)}.")
