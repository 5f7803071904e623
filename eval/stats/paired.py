"""Two systems on the same prompts, yes or no: exact McNemar, Tango's score interval, non-inferiority.

Interval: T. Tango (1998), Statistics in Medicine 17:891-908,
doi 10.1002/(SICI)1097-0258(19980430)17:8<891::AID-SIM780>3.0.CO;2-B
It inverts McNemar's score test and was chosen by exact sums (benchmarks/coverage.py): where few prompts change it comes nearer to
what it promises than Newcombe's square-and-add interval (1998, method 10), which is wider than need be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

from resafe.errors import ResafeError
from resafe.eval.stats._common import Array, Difference, check_paired, normal_quantile

Decision = Literal["kept", "degraded", "unclear"]

HALVINGS = 55  # of an interval of at most 2: to 1e-16


class Table(NamedTuple):
    """The paired 2x2 table; a share of seeds makes fractional counts, hence floats."""

    both: float  # a: yes before and after
    before: float  # b: yes before only
    after: float  # c: yes after only
    neither: float  # d


def crosstab(before: Sequence[bool], after: Sequence[bool]) -> Table:
    """Count the pairs of two verdicts on the same prompts."""
    check_paired(before, after)
    pairs = [(bool(x), bool(y)) for x, y in zip(before, after)]
    return Table(*(pairs.count(p) for p in ((True, True), (True, False), (False, True), (False, False))))


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p of b against c discordant pairs: Binomial(b + c, 1/2)."""
    return float(stats.binomtest(b, b + c).pvalue) if b + c else 1.0


def tango(table: Table, level: float = 0.95) -> Difference:
    """Difference after - before from a paired 2x2 table, with Tango's score interval. Raises ResafeError for no pair."""
    if sum(table) == 0:
        raise ResafeError("a paired difference needs at least one pair.")
    low, high = tango_limits(table.before, table.after, sum(table), normal_quantile(level))
    return Difference((table.after - table.before) / sum(table), float(low), float(high))


def tango_limits(b: Any, c: Any, n: Any, z: float) -> tuple[Array, Array]:
    """Limits of c/n - b/n for b losses and c gains among n > 0 pairs [...]: the differences with |`tango_score`| <= z.

    b, c and n broadcast together and need not be whole. The score falls as the difference rises, so that each limit is
    found by halving what lies between the estimate and the end of the scale.
    """
    b, c, n = np.broadcast_arrays(*(np.asarray(x, dtype=float) for x in (b, c, n)))
    estimate = (c - b) / n
    limits = []
    for end in (-1.0, 1.0):
        inside, outside = estimate, np.full_like(n, end)
        for _ in range(HALVINGS):
            middle = (inside + outside) / 2
            within = np.abs(c - b - n * middle) <= z * _deviation(b, c, n, middle)
            inside, outside = np.where(within, middle, inside), np.where(within, outside, middle)
        limits.append(outside)
    return limits[0], limits[1]


def tango_score(b: Any, c: Any, n: Any, delta: Any) -> Array:
    """z of the hypothesis that gains less losses are `delta` in (-1, 1), by the likelihood constrained to it (Tango 1998)."""
    b, c, n, delta = np.broadcast_arrays(*(np.asarray(x, dtype=float) for x in (b, c, n, delta)))
    above, below = c - b - n * delta, _deviation(b, c, n, delta)
    certain = np.where(above == 0, 0.0, np.copysign(np.inf, above))
    found: Array = np.divide(above, below, out=certain, where=below > 0)
    return found


def _deviation(b: Array, c: Array, n: Array, delta: Array) -> Array:
    """Standard deviation of c - b under the hypothesis: q, the probability of a loss, is the likeliest one with gains of
    q + delta: the larger root of 2n q^2 - (b + c - (2n - c + b) delta) q - b delta (1 - delta) = 0.
    """
    half = b + c - (2 * n - c + b) * delta
    q = (np.sqrt(np.maximum(0.0, half * half + 8 * n * b * delta * (1 - delta))) + half) / (4 * n)
    found: Array = np.sqrt(np.maximum(0.0, n * (2 * q + delta * (1 - delta))))
    return found


def paired_difference(before: Sequence[bool], after: Sequence[bool], level: float = 0.95) -> Difference:
    """Rate after - rate before on the same prompts, with Tango's score interval."""
    return tango(crosstab(before, after), level)


def non_inferior(
    before: Sequence[bool],
    after: Sequence[bool],
    margin: float = 0.02,
    level: float = 0.95,
    higher_is_better: bool = True,
) -> Decision:
    """Is `after` worse than `before` by less than `margin`? Decided by the paired interval, never by p > 0.05."""
    return within_margin(paired_difference(before, after, level), margin, higher_is_better)


def within_margin(found: Difference, margin: float, higher_is_better: bool = True) -> Decision:
    """What an interval of a difference says of a margin, in the units of the interval.

    "kept": the whole interval is better than -margin; "degraded": the whole interval is worse than no change and
    the estimate is worse than -margin; "unclear": too few prompts to say.
    """
    worst, best = (found.low, found.high) if higher_is_better else (-found.high, -found.low)
    if worst > -margin:
        return "kept"
    estimate = found.difference if higher_is_better else -found.difference
    return "degraded" if best < 0 and estimate < -margin else "unclear"
