"""Two systems on the same prompts, yes or no: exact McNemar, Newcombe's paired interval, non-inferiority.

Interval: R. G. Newcombe (1998), Statistics in Medicine 17:2635-2650, method 10,
doi 10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

from resafe.errors import ResafeError
from resafe.eval.stats._common import Array, Difference, check_paired, normal_quantile, score_limits

Decision = Literal["kept", "degraded", "unclear"]


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


def newcombe(table: Table, level: float = 0.95) -> Difference:
    """Difference after - before from a paired 2x2 table: Newcombe's method 10."""
    if sum(table) == 0:
        raise ResafeError("a paired difference needs at least one pair.")
    low, high = newcombe_limits(*table, level)
    return Difference((table.after - table.before) / sum(table), float(low), float(high))


def newcombe_limits(a: Any, b: Any, c: Any, d: Any, level: float = 0.95) -> tuple[Array, Array]:
    """Limits of many tables at once; the four cells broadcast together, and no table is empty.

    Wilson limits (l, u) of both rates are squared and added, corrected for their correlation phi:
        low  = D - sqrt((p2-l2)^2 - 2 phi (p2-l2)(u1-p1) + (u1-p1)^2)
        high = D + sqrt((u2-p2)^2 - 2 phi (u2-p2)(p1-l1) + (p1-l1)^2)
    with 1 = before, 2 = after, D = p2 - p1.
    """
    a, b, c, d = (np.asarray(x, dtype=float) for x in (a, b, c, d))
    n, z = a + b + c + d, normal_quantile(level)
    p1, p2, phi = (a + b) / n, (a + c) / n, _phi(a, b, c, d)
    (l1, u1), (l2, u2) = score_limits(p1, n, z), score_limits(p2, n, z)
    below = np.sqrt(np.maximum(0.0, (p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2))
    above = np.sqrt(np.maximum(0.0, (u2 - p2) ** 2 - 2 * phi * (u2 - p2) * (p1 - l1) + (p1 - l1) ** 2))
    return np.maximum(-1.0, (c - b) / n - below), np.minimum(1.0, (c - b) / n + above)


def _phi(a: Array, b: Array, c: Array, d: Array) -> Array:
    """Correlation of the two verdicts; a positive ad - bc is first reduced by n/2, not below 0 (method 10)."""
    margins, cross = (a + b) * (c + d) * (a + c) * (b + d), a * d - b * c
    cross = np.where(cross > 0, np.maximum(0.0, cross - (a + b + c + d) / 2), cross)
    return np.where(margins > 0, cross / np.sqrt(np.where(margins > 0, margins, 1.0)), 0.0)


def paired_difference(before: Sequence[bool], after: Sequence[bool], level: float = 0.95) -> Difference:
    """Rate after - rate before on the same prompts, with Newcombe's paired interval."""
    return newcombe(crosstab(before, after), level)


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
