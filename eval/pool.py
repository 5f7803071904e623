"""One number for several training seeds: rows of targets that differ in their seed alone, joined.

A single target keeps its own row. Several are pooled over all (prompt, seed) pairs; prompts and seeds are crossed clusters
(`stats.clustered_interval`): the same 100 prompts put to three models are not 300, and three models are few, so where seeds
differ the interval is wide.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from resafe.eval import stats
from resafe.eval.metrics import RATE, Scale, Vote, binary
from resafe.eval.results import Results, Row

Key = tuple[str, str, str]  # suite, metric, judge
Votes = list[tuple[str, str, Vote]]  # (prompt, target, vote), scored ones only


def groups(results: Results) -> dict[tuple[str, str], list[str]]:
    """(attack, mitigation) -> its targets, one per training seed; in order of appearance.

    Targets with the same labels are repetitions of each other only if each has a seed, and no two the same; else each goes
    under its own name.
    """
    labels = {target: results.labels(target) for target in results.targets}
    found: dict[tuple[str, str], list[str]] = {}
    for target, (attack, mitigation, _) in labels.items():
        seeds = [seed for a, m, seed in labels.values() if (a, m) == (attack, mitigation)]
        alone = len(seeds) == 1 or (None not in seeds and seeds.count(labels[target][2]) == 1)
        found.setdefault((attack, mitigation if alone else target), []).append(target)
    return found


def pooled(results: Results, level: float = 0.95, only: Collection[Key] | None = None) -> list[Row]:
    """The rows of each (attack, mitigation) over its training seeds; `only` some (suite, metric, judge).

    {attack, mitigation, seeds, targets, suite, kind, metric, judge, value, low, high, n, n_scored,
    bound_low, bound_high, scale_low, scale_high}
    """
    out = []
    for (attack, mitigation), targets in groups(results).items():
        own = [r for r in results.rows if r["target"] in targets]
        for key in dict.fromkeys((r["suite"], r["kind"], r["metric"], r["judge"]) for r in own):
            suite, kind, metric, judge = key
            if only is not None and (suite, metric, judge) not in only:
                continue
            rows = [r for r in own if (r["suite"], r["metric"], r["judge"]) == (suite, metric, judge)]
            who = {"attack": attack, "mitigation": mitigation, "seeds": len(rows), "targets": targets}
            what = {"suite": suite, "kind": kind, "metric": metric, "judge": judge}
            out.append({**who, **what, **_joined(results, rows, level)})
    return out


def _joined(results: Results, rows: list[Row], level: float) -> dict[str, Any]:
    n, scored = sum(r["n"] for r in rows), sum(r["n_scored"] for r in rows)
    first = {k: rows[0][k] for k in ("value", "low", "high", "scale_low", "scale_high")}
    first |= {k: sum(r[k] * r["n"] for r in rows) / n if n else rows[0][k] for k in ("bound_low", "bound_high")}
    if len(rows) == 1 or scored == 0:
        return {**first, "n": n, "n_scored": scored}
    votes, scale = [v for r in rows for v in _votes(results, r)], (first["scale_low"], first["scale_high"])
    value, (low, high) = pool([v for _, _, v in votes], [p for p, _, _ in votes], [t for _, t, _ in votes], level, scale)
    return {**first, "value": value, "low": low, "high": high, "n": n, "n_scored": scored}


def _votes(results: Results, row: Row) -> Votes:
    items = results.items[row["target"]][row["suite"]]
    column = items.column(row["metric"], row["judge"])
    return [(prompt, row["target"], vote) for prompt, vote in zip(items.prompts, column) if vote is not None]


def pool(
    votes: list[Vote], prompts: list[str], seeds: list[str], level: float = 0.95, scale: Scale = RATE
) -> tuple[float, stats.Interval]:
    """The pooled mean of (prompt, seed) votes and its interval; for one seed Wilson's, or `mean_interval`."""
    found = [float(v) for v in votes]
    value = sum(found) / len(found)
    if len(set(seeds)) > 1:
        return value, stats.clustered_interval(found, prompts, *scale, level, crossed=seeds)
    if binary(votes) and scale == RATE:
        return value, stats.wilson(sum(votes), len(votes), level)
    return value, stats.mean_interval(found, *scale, level)
