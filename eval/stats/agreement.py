"""Agreement of judges beyond chance.

Kappa: J. Cohen (1960), doi 10.1177/001316446002000104. Alpha: K. Krippendorff (2011), "Computing Krippendorff's
Alpha-Reliability", https://repository.upenn.edu/asc_papers/43
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from resafe.errors import ResafeError
from resafe.eval.stats._common import Array
from resafe.eval.stats.paired import crosstab

DRAWS = 20_000
Measurement = Literal["nominal", "ordinal", "interval"]


def cohen_kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Agreement of two judges beyond chance; None where both say the same thing of everything (undefined)."""
    a, b, c, d = crosstab(first, second)
    n = a + b + c + d
    chance = ((a + b) * (a + c) + (c + d) * (b + d)) / (n * n) if n else 1.0
    return None if chance == 1 else ((a + d) / n - chance) / (1 - chance)


def kappa_interval(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float]:
    """95 % interval of Cohen's kappa; (-1, 1) where it is undefined.

    Equal-tailed, by 20,000 seeded draws of the table's four shares, counts + 1/2 of them each (Jeffreys' prior, for a share the
    interval of Brown, Cai and DasGupta 2001, doi 10.1214/ss/1009213286), and widened to hold the estimate. Resampling rows instead
    leaves no width where judges never disagree.
    """
    value = cohen_kappa(first, second)
    if value is None:
        return -1.0, 1.0
    a, b, c, d = np.random.default_rng(0).dirichlet(np.array(crosstab(first, second)) + 0.5, DRAWS).T
    chance = (a + b) * (a + c) + (c + d) * (b + d)
    low, high = np.quantile((a + d - chance) / (1 - chance), [0.025, 0.975])
    return min(value, float(low)), max(value, float(high))


def krippendorff_alpha(
    columns: Sequence[Sequence[float | None]], level_of_measurement: Measurement = "nominal"
) -> float | None:
    """Agreement of any number of judges (one column each, one entry per answer, None: unscored).

    1 - observed / expected disagreement over all pairs of verdicts on the same answer; an answer with fewer than two
    verdicts counts for nothing. None where it is undefined: no such pair, or all paired verdicts are the same value.
    """
    if len({len(column) for column in columns}) > 1:
        raise ResafeError(f"judges must speak of the same answers; found {', '.join(str(len(c)) for c in columns)}.")
    counts, values = _counts(columns)
    if len(values) < 2:
        return None
    pairable = counts.sum(axis=1)
    weights = 1 / (pairable - 1)
    coincidences = counts.T @ (counts * weights[:, None]) - np.diag(weights @ counts)
    totals = counts.sum(axis=0)
    distance = _distance(values, totals, level_of_measurement)
    expected = float(totals @ distance @ totals)
    return 1 - float(totals.sum() - 1) * float((coincidences * distance).sum()) / expected


def _counts(columns: Sequence[Sequence[float | None]]) -> tuple[Array, Array]:
    """How often each value [v] was given to each answer [n, v], of answers with two verdicts or more."""
    answers = [[float(v) for v in answer if v is not None] for answer in zip(*columns)]
    answers = [answer for answer in answers if len(answer) > 1]
    values = sorted({v for answer in answers for v in answer})
    return np.array([[answer.count(v) for v in values] for answer in answers], dtype=float), np.array(values)


def _distance(values: Array, totals: Array, level_of_measurement: Measurement) -> Array:
    """Squared distance of each two values [v, v]; ordinal ones are as far apart as verdicts lie between them."""
    places = {
        "nominal": None,
        "ordinal": np.cumsum(totals) - totals / 2,
        "interval": values,
    }  # fmt: skip
    if level_of_measurement not in places:
        raise ResafeError(f"alpha is for {', '.join(places)} values; found '{level_of_measurement}'.")
    place = places[level_of_measurement]
    distance: Array = 1 - np.eye(len(values)) if place is None else (place[:, None] - place) ** 2
    return distance
