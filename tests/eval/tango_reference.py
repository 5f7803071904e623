"""Tango's interval written anew from its definition: likelihoods are maximised and scores inverted by root finding."""

from __future__ import annotations

import math

from scipy import optimize, stats


def limits(b: float, c: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """The differences gains - losses at which the score of b losses and c gains among n pairs is z and -z."""
    z, estimate = float(stats.norm.ppf((1 + level) / 2)), (c - b) / n
    tiny = 1e-13
    low, high = estimate - 1e-11, estimate + 1e-11
    below = optimize.brentq(lambda d: score(b, c, n, d) - z, -1 + tiny, low, xtol=1e-13) if estimate > -1 else -1.0
    above = optimize.brentq(lambda d: score(b, c, n, d) + z, high, 1 - tiny, xtol=1e-13) if estimate < 1 else 1.0
    return float(below), float(above)


def score(b: float, c: float, n: float, delta: float) -> float:
    """(c - b - n delta) over its standard deviation at the likeliest probabilities with p_c - p_b = delta."""
    return (c - b - n * delta) / math.sqrt(n * (likeliest_change(b, c, n, delta) - delta**2))


def likeliest_change(b: float, c: float, n: float, delta: float) -> float:
    """The s = p_b + p_c that maximises b log(s - delta) + c log(s + delta) + (n - b - c) log(1 - s)."""
    size, rest = abs(delta), n - b - c
    near, far = (c, b) if delta < 0 else (b, c)  # near: its probability vanishes at s = |delta|

    def slope(t: float) -> float:  # at s = size + t (1 - size), times 1 - size
        return near / t + far * (1 - size) / (2 * size + t * (1 - size)) - rest / (1 - t)

    ends = 1e-14, 1 - 1e-14
    if slope(ends[0]) <= 0:
        return size
    if slope(ends[1]) >= 0:
        return 1.0
    return size + (1 - size) * float(optimize.brentq(slope, *ends, xtol=1e-16, rtol=1e-14))
