"""Agreement of judges beyond chance, with intervals.

Kappa: J. Cohen (1960), doi 10.1177/001316446002000104. Alpha: K. Krippendorff (2011), "Computing Krippendorff's
Alpha-Reliability", https://repository.upenn.edu/asc_papers/43
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np

from resafe.errors import ResafeError
from resafe.eval.stats._common import Array
from resafe.eval.stats.paired import crosstab

DRAWS = 20_000
EXACT = 1e-9  # terms that differ by less do not vary
Measurement = Literal["nominal", "ordinal", "interval"]


def cohen_kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Agreement of two judges beyond chance; None where both say the same thing of everything (undefined)."""
    a, b, c, d = crosstab(first, second)
    n = a + b + c + d
    chance = ((a + b) * (a + c) + (c + d) * (b + d)) / (n * n) if n else 1.0
    return None if chance == 1 else ((a + d) / n - chance) / (1 - chance)


def kappa_interval(
    first: Sequence[bool], second: Sequence[bool], clusters: Sequence[Hashable] | None = None
) -> tuple[float, float]:
    """95 % interval of Cohen's kappa; (-1, 1) where it is undefined.

    Equal-tailed, by 20,000 seeded draws of the table's four shares, counts + 1/2 of them each (Jeffreys' prior, for a share the
    interval of Brown, Cai and DasGupta 2001, doi 10.1214/ss/1009213286), and widened to hold the estimate. Resampling rows instead
    leaves no width where judges never disagree. Rows that share one of `clusters` (answers of several models to one prompt) may be
    alike: counts are then divided by the design effect (J. N. K. Rao and A. J. Scott 1981, doi 10.1080/01621459.1981.10477633)
    of kappa's linear terms.
    """
    value = cohen_kappa(first, second)
    if value is None:
        return -1.0, 1.0
    cells = np.array(crosstab(first, second), dtype=float)
    x, y = np.array(first, dtype=float), np.array(second, dtype=float)
    terms = (x == y) - (1 - value) * ((2 * y.mean() - 1) * x + (2 * x.mean() - 1) * y)
    a, b, c, d = np.random.default_rng(0).dirichlet(cells / _design_effect(terms, clusters) + 0.5, DRAWS).T
    chance = (a + b) * (a + c) + (c + d) * (b + d)
    low, high = np.quantile((a + d - chance) / (1 - chance), [0.025, 0.975])
    return min(value, float(low)), max(value, float(high))


def alpha_interval(columns: Sequence[Sequence[bool | None]], clusters: Sequence[Hashable] | None = None) -> tuple[float, float]:
    """95 % interval of `krippendorff_alpha` for judges who say yes or no; (-1, 1) where it is undefined.

    As `kappa_interval`: draws of the shares of answers with k yes among r verdicts, counts + 1/2 for each k (as many halves for
    each r as its share of the answers), counts divided by the design effect of alpha's linear terms.
    """
    value = krippendorff_alpha(columns)
    if value is None:
        return -1.0, 1.0
    votes = [[v for v in answer if v is not None] for answer in zip(*columns)]
    kept = [i for i, answer in enumerate(votes) if len(answer) > 1]
    k, r = (np.array([f(votes[i]) for i in kept], dtype=float) for f in (sum, len))
    disagree, yes = 2 * k * (r - k) / (r - 1), k.sum() / r.sum()
    observed, expected = disagree.sum() / r.sum(), 2 * yes * (1 - yes)
    terms = observed * r - disagree + observed / expected * 2 * (1 - 2 * yes) * (k - yes * r)
    effect = _design_effect(terms, None if clusters is None else [clusters[i] for i in kept])
    kinds = [(float(j), float(size)) for size in np.unique(r) for j in range(int(size) + 1)]
    counts = [((k == j) & (r == size)).sum() / effect + (r == size).mean() / 2 for j, size in kinds]
    some, of = np.array(kinds).T
    shares = np.random.default_rng(0).dirichlet(counts, DRAWS)
    total = shares @ of
    share = shares @ some / total
    low, high = np.quantile(1 - shares @ (2 * some * (of - some) / (of - 1)) / total / (2 * share * (1 - share)), [0.025, 0.975])
    return min(value, float(low)), max(value, float(high))


def _design_effect(terms: Array, clusters: Sequence[Hashable] | None) -> float:
    """By how much rows [n] that share a cluster are worth less than n independent ones; where no term varies, or one cluster has all, the clusters count."""
    if clusters is None:
        return 1.0
    codes, terms = np.unique([str(c) for c in clusters], return_inverse=True)[1], terms - terms.mean()
    groups, spread = int(codes.max()) + 1, float((terms**2).sum())
    if groups == 1 or spread < len(terms) * EXACT**2:
        return len(terms) / groups
    return max(1.0, float((np.bincount(codes, weights=terms) ** 2).sum()) / spread)


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
