"""Means of bounded values (ratings 1..5, StrongREJECT [0, 1], shares of n sampled answers), alone and paired.

The interval is the score interval: all means that are within z standard errors of the one seen, the standard error being that
of the likeliest distribution with that mean (a multinomial over the values seen and the two ends of the scale, which may have
gone unseen). For yes or no it is Wilson's (1927), for changes of yes or no Tango's (1998), of which it is the general form; the
weights of the constrained likelihood are those of A. B. Owen (1988), Biometrika 75:237-249, doi 10.1093/biomet/75.2.237.

Nothing in it was chosen: benchmarks/coverage.py simulates it. A bootstrap is no way out where high ratings are rare: a column
without any resamples to itself, so that of 50 prompts with 1.5 % of them above the lowest rating the percentile and the BCa
bootstrap cover the mean half of the time.

Wilcoxon's test: F. Wilcoxon (1945), doi 10.2307/3001968.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

from resafe.eval.stats._common import (
    Array,
    Difference,
    Interval,
    check_paired,
    normal_quantile,
    unit_column,
)

END = 1e-12  # what is this near to an end of the scale is the end
DIGITS = 9  # differences of means of shares that are equal but for rounding must tie


def mean_interval(values: Sequence[float], lo: float, hi: float, level: float = 0.95) -> Interval:
    """Interval of the mean of independent values within [lo, hi], in their units.

    Raises ResafeError without values and for values outside the scale.
    """
    x = unit_column(values, lo, hi)
    low, high = mean_limits(x, len(x), normal_quantile(level))
    return lo + (hi - lo) * low, lo + (hi - lo) * high


def mean_limits(x: Array, n: float, z: float) -> Interval:
    """Score limits of the mean of `n` independent values that are distributed as x [m] in [0, 1]; n need not be m, nor whole."""
    values, counts = np.unique(x, return_counts=True)
    shares = counts / len(x)
    return 1 - _upper(1 - values, shares, n, z), _upper(values, shares, n, z)


def mean_score(x: Array, n: float, at: float) -> float:
    """z of the hypothesis that `n` independent values, distributed as x [m] in [0, 1], have the mean `at` in (0, 1).

    `at` is one of the `mean_limits` for this z.
    """
    values, counts = np.unique(x, return_counts=True)
    shares, above = counts / len(x), float(x.mean()) - at
    if abs(above) < END:
        return 0.0
    deviation = _variance(1 - values, shares, 1 - at) if above > 0 else _variance(values, shares, at)
    return n**0.5 * above / deviation**0.5 if deviation > 0 else math.copysign(math.inf, above)


def _variance(values: Array, shares: Array, d: float) -> float:
    """Of the likeliest distribution with the mean d, larger than that of the values (`_upper`)."""
    mean, gap = float(shares @ values), np.where(1 - values < END, 0.0, 1 - values)
    if gap.all() and (1 - d) * float((shares / gap).sum()) <= 1:
        return (1 - d) * (d - mean)

    def likeliest(c: float) -> Array:
        p = shares * (gap == 0) if c == 0 and not gap.all() else shares / (c + (1 - c) * gap)
        scaled: Array = p / p.sum()
        return scaled

    p = likeliest(optimize.brentq(lambda c: float(likeliest(c) @ values) - d, 0.0, 1.0, xtol=1e-300, rtol=1e-15, maxiter=2000))
    return float(p @ (values - d) ** 2)


def _upper(values: Array, shares: Array, n: float, z: float) -> float:
    """The largest mean d that is possible: n (d - mean)^2 <= z^2 variance(d), by the likeliest distribution p with mean d.

    With a multiplier t, p_i = share_i / (1 + t (v_i - d)), or share_i / (c + (1 - c)(1 - v_i)), scaled to 1, for c from 1 (d is
    the mean) to 0 (an end of the scale that was seen has all; one that was not, nothing yet). From there on
    t = -1 / (1 - d) stays at its bound, p_i = share_i (1 - d) / (1 - v_i), the unseen end has the rest, and the variance is
    (1 - d)(d - mean), whatever the values are.
    """
    mean, gap = float(shares @ values), np.where(1 - values < END, 0.0, 1 - values)
    if mean >= 1 - END:
        return 1.0
    beyond = (n * mean + z * z) / (n + z * z)
    if gap.all() and (1 - beyond) * float((shares / gap).sum()) <= 1:
        return beyond

    def tilted(c: float) -> tuple[float, float]:
        if c == 0 and not gap.all():
            return 1.0, n**0.5 * (1 - mean)
        p = shares / (c + (1 - c) * gap)
        p /= p.sum()
        d = float(p @ values)
        return d, n**0.5 * (d - mean) - z * max(0.0, float(p @ (values - d) ** 2)) ** 0.5

    root = optimize.brentq(lambda c: tilted(c)[1], 0.0, 1.0, xtol=1e-300, rtol=1e-15, maxiter=2000)
    return tilted(root)[0]


def paired_mean_difference(
    before: Sequence[float], after: Sequence[float], lo: float, hi: float, level: float = 0.95
) -> Difference:
    """Mean after - mean before of values within [lo, hi] on the same prompts, in their units.

    The score interval of the mean change, which lies within the whole scale either way: a change that was not seen may be
    by all of it, however small the others are. For columns of the two ends alone it is `paired.tango`.

    Raises ResafeError for columns of unequal length, without values, and for values outside the scale.
    """
    check_paired(before, after)
    changes = unit_column(after, lo, hi) - unit_column(before, lo, hi)
    low, high = mean_limits((1 + changes) / 2, len(changes), normal_quantile(level))
    return Difference(*((hi - lo) * x for x in (float(changes.mean()), 2 * low - 1, 2 * high - 1)))


def wilcoxon_signed_rank(before: Sequence[float], after: Sequence[float]) -> float:
    """Two-sided p of scipy.stats.wilcoxon: exact for few prompts, else the normal approximation corrected for ties.

    Prompts that did not change are dropped (Wilcoxon's own rule); 1 where none changed. Differences are compared to
    9 digits, so that 0.6 - 0.4 and 0.4 - 0.2 tie.
    """
    check_paired(before, after)
    changes = np.round(np.asarray(after, dtype=float) - np.asarray(before, dtype=float), DIGITS)
    return float(stats.wilcoxon(changes).pvalue) if changes.any() else 1.0
