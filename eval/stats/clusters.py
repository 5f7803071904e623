"""Means of rows that are not independent: prompts of one category, the same prompts put to several training seeds.

- clusters: Student's t over their means, R. Ibragimov and U. K. Müller (2010), doi 10.1198/jbes.2009.08046
- crossed clusters (prompts x seeds) by variance components: the two-way layout with interaction, degrees of freedom by
  F. E. Satterthwaite (1946), doi 10.2307/3002019
- the same, resampled: the pigeonhole bootstrap, A. B. Owen (2007), arXiv 0712.1111
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import stats

from resafe.errors import ResafeError
from resafe.eval.stats._common import Array, Interval, unit_column, upper_tail
from resafe.eval.stats.means import mean_interval, mean_limits, mean_score

EXACT = 12  # digits to which values are told apart
LEVEL = 0.95


def clustered_interval(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    lo: float = 0.0,
    hi: float = 1.0,
    level: float = 0.95,
    crossed: Sequence[Hashable] | None = None,
) -> Interval:
    """Interval of the mean of values [n] within [lo, hi] whose rows come in clusters, both drawn from many more.

    `clusters` alone: rows of a cluster may be alike (prompts of a category). With `crossed`, a second clustering of the
    same rows (clusters = prompts, crossed = seeds), one row for each pair, few of them missing. The score limits are those
    of `mean_interval`, which it is where no two rows share a cluster, for as many independent rows as would make the
    same variance of the mean, with Student's quantile: two or three clusters say little of all others, so that the interval
    is wide; one says nothing: the whole scale. Clusters may be alike by chance: the interval is at least as wide as one
    standard error of independent rows to either side (chosen by simulation, and simulated again at points drawn
    afterwards: benchmarks/coverage.py). One seed alone is not counted as a cluster: the interval is then about that seed.
    Where no value varies, the clusters count, not the rows.

    Raises ResafeError for values outside the scale, labels that do not match them, and two rows for a pair.
    """
    x, first, second = _laid_out(values, clusters, lo, hi, crossed)
    if first.max() + 1 == len(x) and second.max() == 0:
        return mean_interval(values, lo, hi, level)
    if first.max() == 0:
        return lo, hi
    rows, freedom = _worth(x, first, second, level)
    low, high = mean_limits(x, rows, float(stats.t.ppf(upper_tail(level), freedom)))
    return lo + (hi - lo) * low, lo + (hi - lo) * high


def crossed_test(values: Sequence[float], clusters: Sequence[Hashable], crossed: Sequence[Hashable], lo: float, hi: float) -> float:
    """Two-sided p of a mean of 0, for values [n] within [lo, hi] in crossed clusters, both drawn from many more.

    Below 1 - level where `clustered_interval` excludes 0 at that level, and only there, with two seeds or more: Student's t of the score.
    A sign test of each cluster's sum is no such test: where seeds share what they are compared with, rises outnumber falls of the same
    sum.
    Raises ResafeError as `clustered_interval`.
    """
    x, first, second = _laid_out(values, clusters, lo, hi, crossed)
    if first.max() == 0:
        return 1.0
    rows, freedom = _worth(x, first, second, LEVEL)
    return float(2 * stats.t.sf(abs(mean_score(x, rows, -lo / (hi - lo))), freedom))


def _laid_out(
    values: Sequence[float], clusters: Sequence[Hashable], lo: float, hi: float, crossed: Sequence[Hashable] | None
) -> tuple[Array, Array, Array]:
    """Values in [0, 1] and the numbers of their clusters, each [n]; the second are all 0 where nothing crosses."""
    x, first = np.round(unit_column(values, lo, hi), EXACT), _codes(clusters, len(values))
    second = np.zeros_like(first) if crossed is None else _codes(crossed, len(x))
    if second.max() > 0 and len(set(zip(first.tolist(), second.tolist()))) < len(x):
        raise ResafeError("crossed clusters hold one row for each pair: average the rows of a pair first.")
    return x, first, second


def _worth(x: Array, first: Array, second: Array, level: float) -> tuple[float, float]:
    """How many independent rows would make the same variance of the mean of x [n], and with how many degrees of freedom."""
    groups = float(first.max()) + 1
    if not np.ptp(x):
        return groups, math.inf
    crossed = bool(second.any())
    variance, freedom = _two_way(x, first, second) if crossed else _one_way(x, first)
    if not crossed:
        variance = max(variance, float(x.var()) / len(x) / float(stats.t.ppf(upper_tail(level), freedom)) ** 2)
    return float(x.var()) / variance if variance > 0 else groups, freedom


def _one_way(x: Array, codes: Array) -> tuple[float, float]:
    """Variance of the mean of x [n] between clusters, and its degrees of freedom.

    Clusters of unequal size count as (sum n_g)^2 / sum n_g^2 equal ones.
    """
    sizes = np.bincount(codes)
    sums = np.bincount(codes, weights=x - x.mean())
    between = float((sums**2).sum()) * len(sizes) / (len(sizes) - 1) / len(x) ** 2
    freedom = len(x) ** 2 / float((sizes.astype(float) ** 2).sum()) - 1
    return between, max(1.0, freedom)


def _two_way(x: Array, rows: Array, columns: Array) -> tuple[float, float]:
    """Variance of the mean of x [n] over crossed rows and columns, and its degrees of freedom.

    E[MS_rows + MS_columns - MS_rest] = n Var(mean) in the balanced layout; not less than either of the two, as chance
    may make MS_rest the largest.
    """
    row_effect, column_effect = (_effects(x, codes) for codes in (rows, columns))
    rest = x - x.mean() - row_effect - column_effect
    freedoms = np.array([rows.max(), columns.max(), max(1, len(x) - rows.max() - columns.max() - 1)], dtype=float)
    squares = np.array([float((effect**2).sum()) for effect in (row_effect, column_effect, rest)]) / freedoms
    total = float(max(squares[0] + squares[1] - squares[2], squares[0], squares[1]))
    spread = float((squares**2 / freedoms).sum())
    return total / len(x), max(1.0, total**2 / spread) if total else math.inf


def _effects(x: Array, codes: Array) -> Array:
    """The mean of each row's cluster less the mean of all, row by row."""
    means = np.bincount(codes, weights=x) / np.bincount(codes)
    effect: Array = (means - x.mean())[codes]
    return effect


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
        raise ResafeError(f"clustered rows need one label for each of their values; found {len(labels)} for {n}.")
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
