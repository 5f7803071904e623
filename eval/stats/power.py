"""How many prompts an answer takes: power of McNemar's exact test, and of a non-inferiority decision."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

from resafe.errors import ResafeError
from resafe.eval.stats._common import Array, normal_quantile
from resafe.eval.stats.paired import tango_score

MOST = 20_000  # prompts; beyond, the answer is "not with prompts"
TAIL = 1e-6  # what a sum over a binomial's counts may leave out at either end


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


def prompts_needed(p10: float, p01: float, power: float = 0.8, alpha: float = 0.05, most: int = MOST) -> int | None:
    """The number of prompts from which `power_mcnemar` reaches `power`; None when it is above `most`."""
    return smallest(lambda n: power_mcnemar(n, p10, p01, alpha) >= power, most)


def power_non_inferior(n: int, margin: float, discordance: float, level: float = 0.95) -> float:
    """Probability that n prompts end in "kept" (`non_inferior`) when nothing has changed.

    `discordance` is the share of prompts on which the two systems differ, half of them each way (even the same model
    differs from itself when answers are sampled). By symmetry it is the same for rates that should rise and for rates that
    should fall. The probabilities of all tables are summed, less the outermost tails.
    """
    _check_plan(margin, discordance)
    differing = _likely(n, discordance)
    chances = stats.binom.pmf(differing, n, discordance)
    return float(sum(w * _kept(n, m, margin, level) for m, w in zip(differing.tolist(), chances)))


def _kept(n: int, m: int, margin: float, level: float) -> float:
    """The same where m of n prompts differ: the interval's lower end is above -margin where the score there is above z."""
    lost = _likely(m, 0.5)
    kept = tango_score(lost, m - lost, n, -margin) > normal_quantile(level)
    return float(stats.binom.pmf(lost, m, 0.5) @ kept)


def sample_size_for_margin(
    margin: float = 0.02,
    power: float = 0.8,
    discordance: float = 0.05,
    level: float = 0.95,
    most: int = MOST,
) -> int | None:
    """The number of prompts from which `power_non_inferior` reaches `power`; None when it is above `most`."""
    _check_plan(margin, discordance)
    return smallest(lambda n: power_non_inferior(n, margin, discordance, level) >= power, most)


def _check_plan(margin: float, discordance: float) -> None:
    if not 0 < margin < 1:
        raise ResafeError(f"a margin is a share between 0 and 1; found {margin}: write 2 points as 0.02.")
    if not 0 <= discordance <= 1:
        raise ResafeError(f"two systems differ on a share of the prompts between 0 and 1; found {discordance:g}.")


def _likely(n: int, p: float) -> Array:
    """The counts of a binomial but for its tails."""
    low, high = stats.binom.ppf([TAIL, 1 - TAIL], n, p)
    return np.arange(max(0, int(low)), int(high) + 1)


def smallest(enough: Callable[[int], bool], most: int) -> int | None:
    """The smallest n up to `most` with enough(n), by doubling and halving; None where there is none.

    Counts are discrete, so that power dips a little here and there: a smaller n may do by chance.
    """
    low, high = 0, 8
    while not enough(high):
        low, high = high, 2 * high
        if low >= most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high if high <= most else None
