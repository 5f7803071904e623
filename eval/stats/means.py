"""Means of bounded values (ratings 1..5, StrongREJECT [0, 1], shares of n sampled answers), alone and paired.

The interval is Wilson's, for the number of yes-or-no answers that would tell as much as the n values do:
    n_eff = n m(1 - m) / s^2, after one value at either end of the scale has been added to m and s^2.
The two values keep a column that never varies from claiming certainty, and leave yes-or-no columns, for which n_eff = n,
with exactly `wilson`. Chosen by simulation (benchmarks/coverage.py): where high ratings are rare, a column without any
resamples to itself, so that of 50 prompts with 1.5 % of them above the lowest rating the percentile and the BCa bootstrap
cover the mean half of the time. Half a value at either end would be nearer 95 % on average, but falls to 77 % where a rare
high value comes on top of a constant low one; one value falls to 88 %, which is no worse than Wilson's own worst.
Wilcoxon's test: F. Wilcoxon (1945), doi 10.2307/3001968.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from resafe.eval.stats._common import (
    Array,
    Difference,
    Interval,
    check_paired,
    normal_quantile,
    score_limits,
    unit_column,
)
from resafe.eval.stats.paired import tango_limits

DIGITS = 9  # differences of means of shares that are equal but for rounding must tie


def mean_interval(values: Sequence[float], lo: float, hi: float, level: float = 0.95) -> Interval:
    """Interval of the mean of independent values within [lo, hi], in their units.

    Raises ResafeError without values and for values outside the scale.
    """
    x = unit_column(values, lo, hi)
    low, high = score_limits(x.mean(), len(x) * yes_or_no_worth(x), normal_quantile(level))
    return lo + (hi - lo) * float(low), lo + (hi - lo) * float(high)


def yes_or_no_worth(x: Array) -> float:
    """How many yes-or-no answers tell as much as one of the values x [n] in [0, 1]: at least 1."""
    n = len(x) + 2  # one more at 0 and one more at 1
    mean, square = (x.sum() + 1) / n, ((x * x).sum() + 1) / n
    return max(1.0, float(mean * (1 - mean) / (square - mean * mean)))


def paired_mean_difference(
    before: Sequence[float], after: Sequence[float], lo: float, hi: float, level: float = 0.95
) -> Difference:
    """Mean after - mean before of values within [lo, hi] on the same prompts, in their units.

    Tango's interval (`paired.tango`) for the number of yes-or-no pairs that would tell as much as the n changes d, in units
    of the scale: n_eff = n (|d| - D^2) / (d^2 - D^2), all means after a change by the whole scale either way has been added;
    of them the mean fall is lost and the mean rise gained. For columns of the two ends alone it is `paired.tango`.
    A change that was not seen may be by the whole scale, however small the others are: a rule that takes it to be like them
    misses it two times of three (benchmarks/coverage.py, "rare changes").

    Raises ResafeError for columns of unequal length, without values, and for values outside the scale.
    """
    check_paired(before, after)
    changes, n = unit_column(after, lo, hi) - unit_column(before, lo, hi), len(before) + 2
    mean, size, square = changes.sum() / n, (np.abs(changes).sum() + 2) / n, ((changes**2).sum() + 2) / n
    worth = len(changes) * max(1.0, float((size - mean**2) / (square - mean**2)))
    fall, rise = np.maximum(-changes, 0.0).mean(), np.maximum(changes, 0.0).mean()
    low, high = tango_limits(worth * fall, worth * rise, worth, normal_quantile(level))
    return Difference(*((hi - lo) * float(x) for x in (changes.mean(), low, high)))


def wilcoxon_signed_rank(before: Sequence[float], after: Sequence[float]) -> float:
    """Two-sided p of scipy.stats.wilcoxon: exact for few prompts, else the normal approximation corrected for ties.

    Prompts that did not change are dropped (Wilcoxon's own rule); 1 where none changed. Differences are compared to
    9 digits, so that 0.6 - 0.4 and 0.4 - 0.2 tie.
    """
    check_paired(before, after)
    changes = np.round(np.asarray(after, dtype=float) - np.asarray(before, dtype=float), DIGITS)
    return float(stats.wilcoxon(changes).pvalue) if changes.any() else 1.0
