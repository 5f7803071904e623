"""The score interval of a bounded mean written anew: the likelihood is maximised for a given mean, and the score inverted by root finding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats


def limits(values: Sequence[float], lo: float, hi: float, n: float | None = None, z: float | None = None) -> tuple[float, float]:
    """The means at which the score of `n` values, distributed like `values`, is z and -z."""
    n, z = n or len(values), z or float(stats.norm.ppf(0.975))
    mean, width = float(np.mean(values)), hi - lo

    def distance(d: float) -> float:
        p = likeliest(values, lo, hi, d)
        variance = sum(q * (v - d) ** 2 for v, q in p.items())
        return abs(d - mean) * n**0.5 - z * variance**0.5

    def edge(end: float) -> float:
        inside = mean + 1e-9 * (end - mean)
        return float(optimize.brentq(distance, inside, end - 1e-13 * np.sign(end - mean) * width, xtol=1e-14)) if abs(end - mean) > 1e-9 else end

    return edge(lo), edge(hi)


def likeliest(values: Sequence[float], lo: float, hi: float, d: float) -> dict[float, float]:
    """Value -> probability, the likeliest with mean d over the values and both ends: p_i = share_i / (1 + t (v_i - d)), which must be positive."""
    shares = {v: k / len(values) for v, k in Counter(values).items()}
    # the derivative of the likelihood in t falls; 1 + t (v - d) > 0 where a value was seen, >= 0 at an end that was not
    least, most = -1 / (hi - d), -1 / (lo - d)

    def slope(t: float) -> float:
        return sum(s * (v - d) / (1 + t * (v - d)) for v, s in shares.items())

    seen_least, seen_most = (-1 / (e - d) if e != d else np.copysign(np.inf, e - d) for e in (max(shares), min(shares)))
    low = least if hi not in shares and slope(least) <= 0 else None
    high = most if lo not in shares and slope(most) >= 0 else None
    if low is not None:
        t = low
    elif high is not None:
        t = high
    else:
        bottom, top = (seen_least if hi in shares else max(least, -1e12)), (seen_most if lo in shares else min(most, 1e12))
        t = float(optimize.brentq(slope, bottom * (1 - 1e-14), top * (1 - 1e-14), xtol=1e-300, rtol=1e-15))
    p = {v: s / (1 + t * (v - d)) for v, s in shares.items()}
    rest = 1 - sum(p.values())
    if low is not None or high is not None:
        p[hi if low is not None else lo] = rest
    return p
