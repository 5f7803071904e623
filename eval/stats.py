"""Intervals and tests for rates: one system, two systems on the same prompts, several training seeds.

Pure functions of counts and booleans; scipy supplies the distributions.

- Wilson score interval: E. B. Wilson (1927), doi 10.1080/01621459.1927.10502953
- paired difference: R. G. Newcombe (1998), Statistics in Medicine 17:2635-2650, method 10,
  doi 10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C
- crossed clusters (prompts x seeds): the pigeonhole bootstrap, A. B. Owen (2007), arXiv 0712.1111
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

from resafe.errors import ResafeError

Interval = tuple[float, float]
Array = np.ndarray[Any, Any]


class Table(NamedTuple):
    """The paired 2x2 table; a share of seeds makes fractional counts, hence floats."""

    both: float  # a: yes before and after
    before: float  # b: yes before only
    after: float  # c: yes after only
    neither: float  # d


class Difference(NamedTuple):
    """after - before, with its interval."""

    difference: float
    low: float
    high: float


def wilson(k: float, n: float, level: float = 0.95) -> Interval:
    """Wilson score interval of k / n; (0, 1) when there is nothing to go by."""
    if not 0 <= k <= n:
        raise ResafeError(f"a rate needs 0 <= k <= n; found k = {k}, n = {n}.")
    if n == 0:
        return 0.0, 1.0
    z = float(stats.norm.ppf((1 + level) / 2))
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def bounds(k: int, n_scored: int, n: int) -> Interval:
    """The rate if every missing verdict were a no, and if every one were a yes."""
    return (k / n, (k + n - n_scored) / n) if n else (0.0, 1.0)


def crosstab(before: Sequence[bool], after: Sequence[bool]) -> Table:
    """Count the pairs of two verdicts on the same prompts."""
    if len(before) != len(after):
        raise ResafeError(f"paired verdicts must be on the same prompts; found {len(before)} and {len(after)}.")
    pairs = [(bool(x), bool(y)) for x, y in zip(before, after)]
    return Table(*(pairs.count(p) for p in ((True, True), (True, False), (False, True), (False, False))))


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p of b against c discordant pairs: Binomial(b + c, 1/2)."""
    return float(stats.binomtest(b, b + c).pvalue) if b + c else 1.0


def newcombe(table: Table, level: float = 0.95) -> Difference:
    """Difference after - before from a paired 2x2 table: Newcombe's method 10.

    Wilson limits (l, u) of both rates are squared and added, corrected for their correlation phi:
        low  = D - sqrt((p2-l2)^2 - 2 phi (p2-l2)(u1-p1) + (u1-p1)^2)
        high = D + sqrt((u2-p2)^2 - 2 phi (u2-p2)(p1-l1) + (p1-l1)^2)
    with 1 = before, 2 = after, D = p2 - p1.
    """
    a, b, c, d = table
    n = a + b + c + d
    if n == 0:
        raise ResafeError("a paired difference needs at least one pair.")
    (l1, u1), (l2, u2) = wilson(a + b, n, level), wilson(a + c, n, level)
    p1, p2 = (a + b) / n, (a + c) / n
    phi = _phi(table)
    below = math.sqrt(max(0.0, (p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2))
    above = math.sqrt(max(0.0, (u2 - p2) ** 2 - 2 * phi * (u2 - p2) * (p1 - l1) + (p1 - l1) ** 2))
    difference = (c - b) / n
    return Difference(difference, max(-1.0, difference - below), min(1.0, difference + above))


def _phi(table: Table) -> float:
    """Correlation of the two verdicts; a positive ad - bc is first reduced by n/2, not below 0 (method 10)."""
    a, b, c, d = table
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    cross = a * d - b * c
    if margins <= 0:
        return 0.0
    return (max(0.0, cross - (a + b + c + d) / 2) if cross > 0 else cross) / math.sqrt(margins)


def paired_difference(before: Sequence[bool], after: Sequence[bool], level: float = 0.95) -> Difference:
    """Rate after - rate before on the same prompts, with Newcombe's paired interval."""
    return newcombe(crosstab(before, after), level)


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given."""
    adjusted = [0.0] * len(pvalues)
    running = 0.0
    for rank, i in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        running = max(running, min(1.0, (len(pvalues) - rank) * pvalues[i]))
        adjusted[i] = running
    return adjusted


def non_inferior(
    before: Sequence[bool],
    after: Sequence[bool],
    margin: float = 0.02,
    level: float = 0.95,
    higher_is_better: bool = True,
) -> Literal["kept", "degraded", "unclear"]:
    """Is `after` worse than `before` by less than `margin`? Decided by the paired interval, never by p > 0.05.

    "kept": the whole interval is better than -margin; "degraded": the whole interval is worse than no change and
    the estimate is worse than -margin; "unclear": too few prompts to say.
    """
    found = paired_difference(before, after, level)
    worst, best = (found.low, found.high) if higher_is_better else (-found.high, -found.low)
    if worst > -margin:
        return "kept"
    estimate = found.difference if higher_is_better else -found.difference
    return "degraded" if best < 0 and estimate < -margin else "unclear"


def power_mcnemar(n: int, p10: float, p01: float, alpha: float = 0.05) -> float:
    """Exact power of `mcnemar_exact` with n prompts when the two discordant cells have probability p10 and p01."""
    if p10 < 0 or p01 < 0 or p10 + p01 > 1:
        raise ResafeError(f"discordant probabilities must be >= 0 and add up to <= 1; found {p10} and {p01}.")
    if p10 + p01 == 0:
        return 0.0
    m = np.arange(n + 1)  # number of discordant pairs
    k = stats.binom.ppf(alpha / 2, m, 0.5)  # largest count in the smaller cell that still rejects
    k = np.where(2 * stats.binom.cdf(k, m, 0.5) <= alpha, k, k - 1)
    share = p10 / (p10 + p01)
    reject = np.where(k >= 0, stats.binom.cdf(k, m, share) + stats.binom.sf(m - k - 1, m, share), 0.0)
    return float(np.sum(stats.binom.pmf(m, n, p10 + p01) * reject))


def prompts_needed(p10: float, p01: float, power: float = 0.8, alpha: float = 0.05, most: int = 20_000) -> int | None:
    """The number of prompts from which `power_mcnemar` reaches `power`; None when it is above `most`."""
    low, high = 0, 8
    while power_mcnemar(high, p10, p01, alpha) < power:
        low, high = high, 2 * high
        if low >= most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_mcnemar(middle, p10, p01, alpha) >= power else (middle, high)
    return high


def cluster_bootstrap(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    level: float = 0.95,
    seed: int = 0,
    crossed: Sequence[Hashable] | None = None,
    resamples: int = 2000,
) -> Interval:
    """Percentile interval of a mean whose rows come in clusters, whole clusters resampled with replacement.

    With `crossed`, a second clustering of the same rows (prompts x seeds), both are resampled and their weights
    multiplied. Two or three clusters are few: the interval is then a lower limit of the true uncertainty.
    """
    x = np.asarray(values, dtype=float)
    ways = [_codes(labels, len(x)) for labels in ([clusters] if crossed is None else [clusters, crossed])]
    rng = np.random.default_rng(seed)
    at_once = max(1, 100_000 // len(x))  # stay within a processor's cache
    means = [_resampled(x, ways, min(at_once, resamples - i), rng) for i in range(0, resamples, at_once)]
    low, high = np.nanquantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _codes(labels: Sequence[Hashable], n: int) -> Array:
    if len(labels) != n or n == 0:
        raise ResafeError(f"a bootstrap needs one cluster label for each of its values; found {len(labels)} for {n}.")
    order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.array([order[label] for label in labels])


def _resampled(x: Array, ways: list[Array], count: int, rng: np.random.Generator) -> Array:
    """`count` means of x [n] under multinomial cluster weights; nan where no row was drawn."""
    weights = np.ones((count, len(x)))
    for codes in ways:
        groups = int(codes.max()) + 1
        drawn = rng.integers(groups, size=(count, groups)) + groups * np.arange(count)[:, None]
        weights *= np.bincount(drawn.ravel(), minlength=count * groups).reshape(count, groups)[:, codes]
    total = weights.sum(axis=1)
    means: Array = np.divide(weights @ x, total, out=np.full(count, np.nan), where=total > 0)
    return means


def cohen_kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Agreement of two judges beyond chance; None where both say the same thing of everything (undefined)."""
    a, b, c, d = crosstab(first, second)
    n = a + b + c + d
    chance = ((a + b) * (a + c) + (c + d) * (b + d)) / (n * n) if n else 1.0
    return None if chance == 1 else ((a + d) / n - chance) / (1 - chance)
