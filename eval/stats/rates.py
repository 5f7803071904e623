"""Wilson's score interval of a rate: E. B. Wilson (1927), doi 10.1080/01621459.1927.10502953."""

from __future__ import annotations

from resafe.errors import ResafeError
from resafe.eval.stats._common import Interval, normal_quantile, score_limits


def wilson(k: float, n: float, level: float = 0.95) -> Interval:
    """Wilson score interval of k / n; (0, 1) when there is nothing to go by."""
    if not 0 <= k <= n:
        raise ResafeError(f"a rate needs 0 <= k <= n; found k = {k}, n = {n}.")
    if n == 0:
        return 0.0, 1.0
    low, high = score_limits(k / n, n, normal_quantile(level))
    return float(low), float(high)
