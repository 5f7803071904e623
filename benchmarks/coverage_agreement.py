"""How often the intervals of two or more judges' agreement hold the truth: the points and simulations of coverage.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from scipy import special

from resafe.eval.metrics import share
from resafe.eval.stats import alpha_interval, kappa_interval, krippendorff_alpha

Point = dict[str, Any]
Limits = tuple[float, float]
Judged = tuple[int, float, float, float]  # rows, share labelled yes, sensitivity, specificity
JUDGED: list[Judged] = [
    (n, yes, *judge) for n in (20, 50, 100, 330) for yes in (0.1, 0.3, 0.5)
    for judge in ((0.98, 0.98), (0.9, 0.9), (0.95, 0.7), (0.7, 0.95))
]  # fmt: skip
Panel = tuple[int, int, int, float, float, float, float]  # prompts, targets, judges, log-odds of yes and of an error, their spread over prompts, missing
PANELS: list[Panel] = [
    (n, targets, judges, yes, error, spread, 0.1 * (judges - 2)) for n in (50, 100, 330) for targets in (1, 3, 8) for judges in (2, 3)
    for yes, error, spread in ((-2.0, -2.5, 1.0), (0.0, -2.0, 2.0), (-1.0, -4.0, 1.0))
]  # fmt: skip
TRUTH = 400_000  # answers from which the truth of a panel is taken


def covered(truth: float, draw: Callable[[], Limits], trials: int) -> Point:
    """Coverage and mean width of what `draw` returns."""
    limits = np.array([draw() for _ in range(trials)])
    inside = (limits[:, 0] <= truth + 1e-12) & (truth - 1e-12 <= limits[:, 1])
    return {"coverage": float(inside.mean()), "width": float((limits[:, 1] - limits[:, 0]).mean()), "trials": trials}


def drawn_judges(count: int = 48, seed: int = 20261129) -> list[Judged]:
    """Points drawn at random: 20 to 520 rows, 5 to 60 % of them labelled yes, judges from poor to nearly perfect."""
    rng = np.random.default_rng(seed)
    return [(int(rng.integers(20, 521)), *rng.uniform((0.05, 0.5, 0.6), (0.6, 0.995, 0.995)).tolist()) for _ in range(count)]


def drawn_panels(count: int = 48, seed: int = 20261128) -> list[Panel]:
    """Points drawn at random: 30 to 520 prompts, 1 to 9 targets, 2 to 4 judges, up to three verdicts in ten missing."""
    rng = np.random.default_rng(seed)
    return [
        (int(rng.integers(30, 521)), int(rng.integers(1, 10)), int(rng.integers(2, 5)), *rng.uniform((-2.5, -4, 0, 0), (0.5, -1.5, 2, 0.3)).tolist())
        for _ in range(count)
    ]


def simulated_kappa(trials: int, points: Iterable[Judged] = (), method: str = "") -> Iterator[Point]:
    """`kappa_interval` of a judge against labels, or the percentile bootstrap over rows in its place."""
    for n, yes, sensitivity, specificity in points or JUDGED:
        shares = np.array([yes * sensitivity, yes * (1 - sensitivity), (1 - yes) * (1 - specificity), (1 - yes) * specificity])
        rng = np.random.default_rng(n)

        def draw(n: int = n, shares: Any = shares, rng: Any = rng) -> Limits:
            found = rng.multinomial(n, shares)
            if method == "percentile":
                low, high = np.quantile([kappa(x / n) for x in rng.multinomial(n, found / n, 999)], [0.025, 0.975])
                return float(low), float(high)
            return kappa_interval([True] * (found[0] + found[1]) + [False] * (found[2] + found[3]),
                                  [True] * found[0] + [False] * found[1] + [True] * found[2] + [False] * found[3])  # fmt: skip

        point = {"n": n, "yes": yes, "sensitivity": sensitivity, "specificity": specificity, "expected": n * float(shares[1] + shares[2])}
        yield {**point, **covered(kappa(shares), draw, trials)}


def kappa(shares: Any) -> float:
    """Of a table's shares: both yes, first only, second only, both no; 1 where only one thing is said."""
    a, b, c, d = shares
    chance = (a + b) * (a + c) + (c + d) * (b + d)
    return float((a + d - chance) / (1 - chance)) if chance < 1 else 1.0


def simulated_panels(what: str, trials: int, points: Iterable[Panel] = (), clustered: bool = True) -> Iterator[Point]:
    """Judges on the answers of several targets to the same prompts, as reports pool them: "kappa" and "agreement" of the first two, "alpha"."""
    for n, targets, judges, yes, error, spread, missing in points or PANELS:
        rng = np.random.default_rng(n + targets)

        def votes(prompts: int, targets: int = targets, judges: int = judges, yes: float = yes, error: float = error, spread: float = spread,
                  missing: float = missing, rng: Any = rng) -> list[list[bool | None]]:  # fmt: skip
            about, hard = (spread * rng.normal(size=(prompts, 1, 1)) for _ in range(2))
            truth = rng.random((prompts, targets, 1)) < special.expit(yes + about)
            said = truth ^ (rng.random((prompts, targets, judges)) < special.expit(error + hard))
            seen = (rng.random(said.shape) >= missing) if what == "alpha" else np.ones_like(said)
            return [[bool(v) if s else None for v, s in zip(column, there)] for column, there in zip(said.reshape(-1, judges).T, seen.reshape(-1, judges).T)]

        def draw(n: int = n, targets: int = targets, votes: Any = votes) -> Limits:
            columns, prompts = votes(n), [str(i) for i in range(n) for _ in range(targets)] if clustered else None
            return alpha_interval(columns, prompts) if what == "alpha" else _of_two(what, columns, prompts)

        everything = votes(TRUTH // targets)
        truth = krippendorff_alpha(everything) if what == "alpha" else _truth(what, everything)
        point = {"prompts": n, "targets": targets, "judges": judges, "yes": yes, "error": error, "spread": spread, "missing": missing}
        yield {**point, **covered(truth or 0.0, draw, trials)}


def _of_two(what: str, columns: list[list[Any]], prompts: list[str] | None) -> Limits:
    first, second = columns[:2]
    return kappa_interval(first, second, prompts) if what == "kappa" else share([a == b for a, b in zip(first, second)], prompts)


def _truth(what: str, columns: list[list[Any]]) -> float:
    first, second = (np.array(column, dtype=bool) for column in columns[:2])
    cells = np.array([(first & second).mean(), (first & ~second).mean(), (~first & second).mean(), (~first & ~second).mean()])
    return kappa(cells) if what == "kappa" else float(cells[0] + cells[3])
