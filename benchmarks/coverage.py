"""How often the intervals of resafe.eval.stats hold the truth: exact where counts can be summed over, else simulated.

    python benchmarks/coverage.py                      # everything: about 15 minutes on one core
    python benchmarks/coverage.py --only pool          # one method again; the others are kept

Every interval promises 95 %. Counts are discrete, so that single points swing around it: read the mean over the grid, the
smallest and the largest. Where an outcome is so rare that fewer than five are expected, no interval that allows for what
was not seen can come down to 95 %; hence `mean_from_5_expected` beside the mean. `alternatives` are methods that were not taken, on
the same points, and why not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special, stats
from statsmodels.stats.proportion import proportion_confint

from resafe.eval.stats import (
    cluster_bootstrap,
    clustered_interval,
    mean_interval,
    paired_mean_difference,
    tango_limits,
    wilson,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
from coverage_agreement import Limits, Point, covered, drawn_judges, drawn_panels, simulated_kappa, simulated_panels  # noqa: E402

RESULT = Path(__file__).resolve().parent / "results" / "coverage.json"
Z = 1.959963984540054  # of 95 %
SIZES = (50, 100, 200, 330, 520)
RATES = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5)
PAIRS = (  # rate before, share of prompts lost (yes before only), share gained
    (0.01, 0.005, 0.005), (0.02, 0.01, 0.01), (0.02, 0.005, 0.03), (0.03, 0.01, 0.08), (0.05, 0.01, 0.01),
    (0.05, 0.02, 0.02), (0.05, 0.02, 0.3), (0.1, 0.05, 0.05), (0.3, 0.03, 0.08), (0.3, 0.25, 0.02), (0.6, 0.05, 0.05),
    (0.6, 0.1, 0.05), (0.9, 0.02, 0.02), (0.9, 0.06, 0.03), (0.8, 0.7, 0.01), (0.98, 0.01, 0.01),
)  # fmt: skip
RATINGS = np.linspace(0, 1, 5)  # 1..5
EIGHTHS = np.linspace(0, 1, 9)  # StrongREJECT
FIFTHS = np.linspace(0, 1, 6)  # mean over five sampled answers
COLUMNS: dict[str, tuple[Any, list[float]]] = {  # name -> values in [0, 1], probabilities
    "ratings, nearly all lowest": (RATINGS, [0.985, 0.005, 0, 0, 0.01]),
    "ratings, untouched model": (RATINGS, [0.93, 0.03, 0.01, 0.01, 0.02]),
    "ratings, low": (RATINGS, [0.9, 0.1, 0, 0, 0]),
    "ratings, tuned model": (RATINGS, [0.4, 0.1, 0.08, 0.12, 0.3]),
    "ratings, broken model": (RATINGS, [0.08, 0.04, 0.08, 0.2, 0.6]),
    "ratings, middle": (RATINGS, [0.05, 0.2, 0.5, 0.2, 0.05]),
    "share, 97 % zero": (EIGHTHS, [0.97] + [0.03 / 8] * 8),
    "share, 90 % zero": (EIGHTHS, [0.9, 0.005, 0.005, 0.01, 0.02, 0.02, 0.02, 0.015, 0.005]),
    "share, 60 % zero": (EIGHTHS, [0.6, 0.02, 0.02, 0.04, 0.08, 0.08, 0.08, 0.06, 0.02]),
    "five answers, 2 %": (FIFTHS, stats.betabinom.pmf(range(6), 5, 0.1, 4).tolist()),
    "five answers, 10 %": (FIFTHS, stats.betabinom.pmf(range(6), 5, 0.2, 1.8).tolist()),
    "five answers, 50 %": (FIFTHS, stats.betabinom.pmf(range(6), 5, 0.4, 0.4).tolist()),
}
CHANGES = (  # before, after, share of prompts whose value is drawn again
    ("ratings, nearly all lowest", "ratings, untouched model", 0.1), ("ratings, untouched model", "ratings, untouched model", 0.1),
    ("ratings, untouched model", "ratings, tuned model", 0.6), ("ratings, tuned model", "ratings, tuned model", 0.05),
    ("ratings, tuned model", "ratings, tuned model", 0.3), ("ratings, tuned model", "ratings, untouched model", 0.8),
    ("ratings, broken model", "ratings, tuned model", 0.5), ("ratings, broken model", "ratings, broken model", 0.02),
    ("share, 97 % zero", "share, 97 % zero", 0.3), ("share, 97 % zero", "share, 90 % zero", 1.0),
    ("share, 60 % zero", "share, 90 % zero", 0.7), ("five answers, 2 %", "five answers, 2 %", 1.0),
    ("five answers, 50 %", "five answers, 50 %", 0.1), ("five answers, 50 %", "five answers, 10 %", 0.5),
)  # fmt: skip

def main() -> None:
    """Measure and write the committed JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=sorted(METHODS), default=list(METHODS))
    parser.add_argument("--trials", type=int, default=2000, help="simulated columns per point; a tenth where resampled")
    args = parser.parse_args()
    from resafe.files import write_json

    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in args.only:
        points = list(METHODS[name](args.trials))
        found[name] = summary(points)
        print(name, {k: v for k, v in found[name].items() if k != "points"}, flush=True)
        write_json(RESULT, {name: found[name] for name in METHODS if name in found})


def summary(points: list[Point]) -> dict[str, Any]:
    """Coverage over all points, over those with at least five expected events, and the points themselves."""
    cover = [p["coverage"] for p in points]
    plain = [p["coverage"] for p in points if p.get("expected", 5) >= 5]
    return {
        "mean": float(np.mean(cover)), "min": min(cover), "max": max(cover),
        "mean_from_5_expected": float(np.mean(plain)), "min_from_5_expected": min(plain), "points": points,
    }  # fmt: skip


def exact_wilson(trials: int = 0, sizes: Iterable[int] = SIZES) -> Iterator[Point]:
    """Summed over the binomial."""
    for n in sizes:
        k = np.arange(n + 1)
        limits = np.array([wilson(int(x), n) for x in k])
        for p in RATES:
            covered = stats.binom.pmf(k, n, p) @ ((limits[:, 0] <= p) & (p <= limits[:, 1]))
            yield {"n": n, "rate": p, "expected": n * p, "coverage": float(covered)}


def exact_paired(limits: Callable[..., tuple[Any, Any]], sizes: Iterable[int] = SIZES) -> Iterator[Point]:
    """`limits` of (a, b, c, d), summed over the multinomial of the paired table, less tails of 1e-6."""
    for n in sizes:
        for rate, lost, gained in PAIRS:
            covered, truth = 0.0, gained - lost
            discordant = _likely(n, lost + gained)
            for m, weight in zip(discordant.tolist(), stats.binom.pmf(discordant, n, lost + gained)):
                share, agreed = lost / (lost + gained), (rate - lost) / (1 - lost - gained)
                b, a = _likely(m, share)[:, None], _likely(n - m, agreed)
                low, high = limits(*np.broadcast_arrays(a, b, m - b, n - m - a))
                chance = stats.binom.pmf(b, m, share) * stats.binom.pmf(a, n - m, agreed)
                covered += float(weight * chance[(low <= truth) & (truth <= high)].sum())
            point = {"n": n, "rate": rate, "lost": lost, "gained": gained, "expected": n * (lost + gained)}
            yield {**point, "coverage": covered}


def tango(a: Any, b: Any, c: Any, d: Any) -> tuple[Any, Any]:
    return tango_limits(b, c, a + b + c + d, Z)


def newcombe(a: Any, b: Any, c: Any, d: Any) -> tuple[Any, Any]:
    """R. G. Newcombe (1998), Statistics in Medicine 17:2635-2650, method 10: Wilson limits squared and added."""
    n = a + b + c + d
    p1, p2, margins, cross = (a + b) / n, (a + c) / n, (a + b) * (c + d) * (a + c) * (b + d), a * d - b * c
    cross = np.where(cross > 0, np.maximum(0.0, cross - n / 2), cross)
    phi = np.where(margins > 0, cross / np.sqrt(np.where(margins > 0, margins, 1.0)), 0.0)
    (l1, u1), (l2, u2) = (proportion_confint(p * n, n, 0.05, "wilson") for p in (p1, p2))
    below = np.sqrt((p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2)
    above = np.sqrt((u2 - p2) ** 2 - 2 * phi * (u2 - p2) * (p1 - l1) + (p1 - l1) ** 2)
    return (c - b) / n - below, (c - b) / n + above


def _likely(n: int, p: float) -> Any:
    low, high = stats.binom.ppf([1e-6, 1 - 1e-6], n, p)
    return np.arange(max(0, int(low)), int(high) + 1)


def simulated_mean(trials: int, sizes: Iterable[int] = SIZES, method: str = "score") -> Iterator[Point]:
    """`mean_interval`, or a bootstrap in its place, of columns as judges return them."""
    for n in sizes:
        for name, (values, weights) in COLUMNS.items():
            rng, chances = np.random.default_rng(n), np.array(weights) / sum(weights)

            def draw(n: int = n, values: Any = values, chances: Any = chances, rng: Any = rng) -> Limits:
                x = rng.choice(values, size=n, p=chances)
                return mean_interval(x.tolist(), 0, 1) if method == "score" else bootstrap(x, method, rng)

            most = values[int(np.argmax(chances))]
            point = {"n": n, "column": name, "expected": n * float(chances[values != most].sum())}
            yield {**point, **covered(float(values @ chances), draw, trials)}


def drawn_means(trials: int, count: int = 48, seed: int = 20261128) -> Iterator[Point]:
    """`mean_interval` at points drawn at random: 50 to 520 values, 3 to 97 % of them at the lowest."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        values, n = (RATINGS, EIGHTHS, FIFTHS)[i % 3], int(rng.integers(50, 521))
        lowest = rng.uniform(0.03, 0.97)
        chances = lowest * np.eye(len(values))[0] + (1 - lowest) * rng.dirichlet(np.ones(len(values)))

        def draw(n: int = n, values: Any = values, chances: Any = chances) -> Limits:
            return mean_interval(rng.choice(values, size=n, p=chances).tolist(), 0, 1)

        point = {"n": n, "column": f"drawn {i}", "expected": n * float(1 - chances.max())}
        yield {**point, **covered(float(values @ chances), draw, trials)}


def exact_two_values(trials: int = 0, sizes: Iterable[int] = (50, 100, 330)) -> Iterator[Point]:
    """`mean_interval` at its hardest: all values alike but for a rare other one. Summed over the binomial."""
    for n in sizes:
        for usual, rare in ((0.0, 1.0), (0.0, 0.25), (0.25, 1.0), (0.25, 0.5), (0.5, 1.0), (0.5, 0.75), (0.75, 1.0)):
            k = np.arange(n + 1)
            limits = np.array([mean_interval([usual] * (n - x) + [rare] * x, 0, 1) for x in k.tolist()])
            for p in np.geomspace(0.002, 0.3, 60):
                truth = usual + p * (rare - usual)
                inside = (limits[:, 0] <= truth + 1e-12) & (truth - 1e-12 <= limits[:, 1])
                point = {"n": n, "usual": usual, "rare": rare, "rate": float(p), "expected": float(n * p)}
                yield {**point, "coverage": float(stats.binom.pmf(k, n, p) @ inside)}


Moved = tuple[str, int, Any, Any, Any, float]  # name, prompts, values, probabilities before, after, share drawn again


def moved_columns(sizes: Iterable[int] = SIZES) -> Iterator[Moved]:
    """CHANGES at every size."""
    for n in sizes:
        for before, after, moved in CHANGES:
            values, first, second = COLUMNS[before][0], *(np.array(COLUMNS[c][1]) for c in (before, after))
            yield f"{before} -> {after}", n, values, first / first.sum(), second / second.sum(), moved


def drawn_columns(count: int = 48, seed: int = 20261126) -> Iterator[Moved]:
    """Points drawn at random: 50 to 520 prompts, 3 to 100 % of them drawn again."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        values = (RATINGS, EIGHTHS, FIFTHS)[i % 3]
        lowest = rng.uniform(0, 0.97, 2)[:, None]
        first, second = lowest * np.eye(len(values))[0] + (1 - lowest) * rng.dirichlet(np.ones(len(values)), 2)
        yield f"drawn {i}", int(rng.integers(50, 521)), values, first, second, float(np.exp(rng.uniform(np.log(0.03), 0)))


def simulated_difference(trials: int, points: Iterable[Moved] | None = None, method: str = "score") -> Iterator[Point]:
    """`paired_mean_difference`, or a bootstrap of the differences in its place."""
    for name, n, values, first, second, moved in points or moved_columns():
        rng = np.random.default_rng(n)

        def draw(
            n: int = n, values: Any = values, first: Any = first, second: Any = second, moved: float = moved, rng: Any = rng
        ) -> Limits:
            x = rng.choice(values, size=n, p=first)
            y = np.where(rng.random(n) < moved, rng.choice(values, size=n, p=second), x)
            if method != "score":
                return bootstrap(y - x, method, rng)
            return paired_mean_difference(x.tolist(), y.tolist(), 0, 1)[1:]

        truth, changed = moved * float(values @ (second - first)), n * moved * float(1 - first @ second)
        yield {"n": n, "columns": name, "moved": moved, "expected": changed, **covered(truth, draw, trials)}


def simulated_rare_changes(trials: int, sizes: Iterable[int] = (50, 100, 330)) -> Iterator[Point]:
    """`paired_mean_difference` at its hardest: most prompts do not change, some fall a little, a rare one rises by the whole scale."""
    for n in sizes:
        for step, some, rare in itertools.product((0.05, 0.125, 0.25), (0.02, 0.05, 0.2), (0.004, 0.012, 0.02, 0.05)):
            rng = np.random.default_rng(n)

            def draw(n: int = n, step: float = step, some: float = some, rare: float = rare, rng: Any = rng) -> Limits:
                changes = rng.choice([0.0, -step, 1.0], size=n, p=[1 - some - rare, some, rare])
                before = np.where(changes < 0, step, 0.0)
                return paired_mean_difference(before.tolist(), (before + changes).tolist(), 0, 1)[1:]

            point = {"n": n, "step": step, "some": some, "rare": rare, "expected": n * (some + rare)}
            yield {**point, **covered(rare - some * step, draw, trials)}


def bootstrap(x: Any, method: str, rng: Any) -> Limits:
    """scipy's percentile or BCa bootstrap of a mean; a constant column has no width."""
    if np.ptp(x) == 0:
        return float(x[0]), float(x[0])
    found = stats.bootstrap((x,), np.mean, n_resamples=999, method=method, rng=rng, vectorized=True).confidence_interval
    return float(found.low), float(found.high)


CATEGORIES = [
    (n, [n // count + (i < n % count) for i in range(count)], middle, spread)
    for n in (100, 330) for count in (3, 5, 10, 14) for middle, spread in ((-3.0, 0.0), (-3.0, 1.0), (-1.0, 0.5), (0.0, 1.0))
]  # fmt: skip


def drawn_categories(count: int = 48, seed: int = 20261125) -> list[tuple[int, list[int], float, float]]:
    """Points that had no part in choosing the rule: 2 to 20 categories, equal and unequal, a quarter of them alike."""
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        groups = int(rng.integers(2, 21))
        n, middle = int(rng.integers(8 * groups, 8 * groups + 400)), float(rng.uniform(-3.5, 1.5))
        spread = 0.0 if rng.random() < 0.25 else float(rng.uniform(0, 1.5))
        equal = [n // groups + (j < n % groups) for j in range(groups)]
        sizes = equal if i % 2 else np.maximum(2, rng.multinomial(n, rng.dirichlet([5.0] * groups))).tolist()
        found.append((sum(sizes), sizes, middle, spread))
    return found


def simulated_categories(
    trials: int, sizes: Iterable[int] = (100, 330), points: Iterable[tuple[int, list[int], float, float]] = (), method: str = "t"
) -> Iterator[Point]:
    """Yes or no, prompts in categories whose log-odds differ: `clustered_interval`, or `cluster_bootstrap`."""
    for i, (n, groups, middle, spread) in enumerate(points or [p for p in CATEGORIES if p[0] in sizes]):
        labels, rng = np.repeat(np.arange(len(groups)), groups).tolist(), np.random.default_rng(n + i)

        def draw(groups: list[int] = groups, labels: list[int] = labels, middle: float = middle, spread: float = spread,
                 rng: Any = rng) -> Limits:  # fmt: skip
            odds = middle + spread * rng.normal(size=len(groups))
            x = (rng.random(len(labels)) < special.expit(odds)[labels]).astype(float).tolist()
            if method == "t":
                return clustered_interval(x, labels)
            return cluster_bootstrap(x, labels, resamples=500)

        point = {"n": n, "categories": len(groups), "log_odds": middle, "spread": spread}
        yield {**point, **covered(_mean_rate(middle, spread), draw, trials)}


def _mean_rate(middle: float, spread: float) -> float:
    """Mean of a rate whose log-odds are normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    return float(weights @ special.expit(middle + spread * nodes) / weights.sum())


SEEDS = [(middle, spread, count) for middle in (-4.0, -2.0, 0.0) for spread in (0.0, 0.3, 1.0) for count in (2, 3, 5)]


Seeded = tuple[int, float, float, int, float]  # prompts, log-odds, their spread over seeds, seeds, shift after


def seeded(sizes: Iterable[int] = (50, 100, 330)) -> list[Seeded]:
    """SEEDS at every size."""
    return [(n, *point, shift) for n in sizes for point, shift in zip(SEEDS, [0.0, 1.0, -1.0] * 9)]


def drawn_seeds(count: int = 48, seed: int = 20261128) -> list[Seeded]:
    """Points drawn at random: 50 to 520 prompts, 2 to 6 seeds, a quarter of them alike."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        n, middle, seeds = int(rng.integers(50, 521)), float(rng.uniform(-4, 1)), int(rng.integers(2, 7))
        spread = 0.0 if rng.random() < 0.25 else float(rng.uniform(0, 1))
        found.append((n, middle, spread, seeds, float(rng.uniform(-1, 1))))
    return found


def simulated_seeds(
    interval: Callable[[Any, list[str], list[str]], Limits], trials: int, points: Sequence[Seeded] | None = None
) -> Iterator[Point]:
    """Yes or no over prompts x seeds; both move the log-odds (prompts by 2), the truth is the mean over all of both."""
    for n, middle, spread, count, _ in points or seeded():
        prompts, seeds = [str(i) for i in range(n) for _ in range(count)], [str(s) for s in range(count)] * n
        rng = np.random.default_rng(n)

        def draw(n: int = n, middle: float = middle, spread: float = spread, count: int = count,
                 prompts: list[str] = prompts, seeds: list[str] = seeds, rng: Any = rng) -> Limits:  # fmt: skip
            odds = middle + 2 * rng.normal(size=(n, 1)) + spread * rng.normal(size=(1, count))
            return interval((rng.random((n, count)) < special.expit(odds)).ravel(), prompts, seeds)

        truth = _mean_rate(middle, float(np.hypot(2, spread)))
        yield {"n": n, "log_odds": middle, "seed_spread": spread, "seeds": count, **covered(truth, draw, trials)}


def simulated_seed_changes(
    interval: Callable[[Any, Any, list[str], list[str]], Limits], trials: int, points: Sequence[Seeded] | None = None
) -> Iterator[Point]:
    """The same before and after: prompts keep their effect, seeds move the answers after, on average by the shift."""
    for n, middle, spread, count, shift in points or seeded():
        prompts, seeds = [str(i) for i in range(n) for _ in range(count)], [str(s) for s in range(count)] * n
        rng = np.random.default_rng(n)

        def draw(n: int = n, middle: float = middle, spread: float = spread, count: int = count, shift: float = shift,
                 prompts: list[str] = prompts, seeds: list[str] = seeds, rng: Any = rng) -> Limits:  # fmt: skip
            odds = middle + 2 * rng.normal(size=(n, 1)) + np.zeros((1, count))
            before = rng.random((n, count)) < special.expit(odds)
            odds = odds + shift + spread * rng.normal(size=(1, count))
            return interval(before.ravel(), (rng.random((n, count)) < special.expit(odds)).ravel(), prompts, seeds)

        truth = _mean_rate(middle + shift, float(np.hypot(2, spread))) - _mean_rate(middle, 2)
        point = {"n": n, "log_odds": middle, "shift": shift, "seed_spread": spread, "seeds": count}
        yield {**point, **covered(truth, draw, trials)}


def pooled(votes: Any, prompts: list[str], seeds: list[str]) -> Limits:
    from resafe.eval.pool import pool

    return pool(votes.tolist(), prompts, seeds)[1]


def compared(before: Any, after: Any, prompts: list[str], seeds: list[str]) -> Limits:
    from resafe.eval.comparison import difference

    found = difference(list(zip(prompts, seeds, before.tolist(), after.tolist())))
    return found["low"], found["high"]


def clustered(votes: Any, prompts: list[str], seeds: list[str]) -> Limits:
    return clustered_interval(votes.astype(float).tolist(), prompts, crossed=seeds)


def clustered_changes(before: Any, after: Any, prompts: list[str], seeds: list[str]) -> Limits:
    changes = after.astype(float) - before.astype(float)
    return clustered_interval(changes.tolist(), prompts, -1, 1, crossed=seeds)


METHODS: dict[str, Callable[[int], Iterator[Point]]] = {
    "wilson": exact_wilson,
    "tango": lambda trials: exact_paired(tango),
    "mean_interval": simulated_mean,
    "mean_interval, drawn": drawn_means,
    "mean_interval, two values": exact_two_values,
    "paired_mean_difference": simulated_difference,
    "paired_mean_difference, drawn": lambda trials: simulated_difference(trials, drawn_columns()),
    "paired_mean_difference, rare changes": lambda trials: simulated_rare_changes(trials // 4),
    "clustered_interval, categories": simulated_categories,
    "clustered_interval, categories drawn afterwards": lambda trials: simulated_categories(trials, points=drawn_categories()),
    "clustered_interval, seeds": lambda trials: simulated_seeds(clustered, trials // 2),
    "clustered_interval, changes over seeds": lambda trials: simulated_seed_changes(clustered_changes, trials // 2),
    "clustered_interval, seeds drawn": lambda trials: simulated_seeds(clustered, trials // 2, drawn_seeds()),
    "clustered_interval, changes over seeds drawn": lambda trials: simulated_seed_changes(clustered_changes, trials // 2, drawn_seeds()),
    "pool": lambda trials: simulated_seeds(pooled, trials // 10),
    "difference": lambda trials: simulated_seed_changes(compared, trials // 10),
    "kappa over targets": lambda trials: simulated_panels("kappa", trials // 10),
    "kappa over targets, drawn": lambda trials: simulated_panels("kappa", trials // 10, drawn_panels()),
    "agreement over targets": lambda trials: simulated_panels("agreement", trials // 10),
    "agreement over targets, drawn": lambda trials: simulated_panels("agreement", trials // 10, drawn_panels()),
    "alpha_interval": lambda trials: simulated_panels("alpha", trials // 10),
    "alpha_interval, drawn": lambda trials: simulated_panels("alpha", trials // 10, drawn_panels()),
    "kappa_interval": lambda trials: simulated_kappa(trials // 2),
    "kappa_interval, drawn": lambda trials: simulated_kappa(trials // 2, drawn_judges()),
    "alternative: percentile bootstrap of kappa": lambda trials: simulated_kappa(trials // 8, method="percentile"),
    "alternative: kappa over targets, answers taken for independent": lambda trials: simulated_panels("kappa", trials // 10, clustered=False),
    "alternative: newcombe": lambda trials: exact_paired(newcombe),
    "alternative: percentile bootstrap of a mean": lambda trials: simulated_mean(trials // 4, (50, 100), "percentile"),
    "alternative: BCa bootstrap of a mean": lambda trials: simulated_mean(trials // 4, (50, 100), "BCa"),
    "alternative: percentile bootstrap of a difference": lambda trials: simulated_difference(
        trials // 4, moved_columns((50, 100)), "percentile"
    ),
    "alternative: cluster_bootstrap, categories": lambda trials: simulated_categories(trials // 4, method="bootstrap"),
}


if __name__ == "__main__":
    main()
