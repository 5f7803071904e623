"""One number for several training seeds: rows of targets that differ in their seed alone, joined.

A single target keeps its own row. Several are pooled over all (prompt, seed) pairs; their interval is the union of two,
so that neither few prompts nor few seeds are forgotten:
- Wilson at the pooled rate with n = number of distinct prompts (the same 100 prompts put to three models are not 300);
- the pigeonhole bootstrap that resamples prompts and seeds (stats.cluster_bootstrap), seeded.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from resafe.eval import stats
from resafe.eval.results import Results, Row

Key = tuple[str, str, str]  # suite, metric, judge
Votes = list[tuple[str, str, bool]]  # (prompt, target, vote), scored ones only


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

    {attack, mitigation, seeds, targets, suite, kind, metric, judge, value, low, high, n, n_scored}
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
    if len(rows) == 1 or scored == 0:
        return {k: rows[0][k] for k in ("value", "low", "high")} | {"n": n, "n_scored": scored}
    votes = [v for r in rows for v in _votes(results, r)]
    value, (low, high) = pool([v for _, _, v in votes], [p for p, _, _ in votes], [t for _, t, _ in votes], level)
    return {"value": value, "low": low, "high": high, "n": n, "n_scored": scored}


def _votes(results: Results, row: Row) -> Votes:
    items = results.items[row["target"]][row["suite"]]
    column = items.column(row["metric"], row["judge"])
    return [(prompt, row["target"], vote) for prompt, vote in zip(items.prompts, column) if vote is not None]


def pool(votes: list[bool], prompts: list[str], seeds: list[str], level: float = 0.95) -> tuple[float, stats.Interval]:
    """The pooled rate of (prompt, seed) votes, and the union of its two intervals; Wilson's alone for one seed."""
    value, distinct = sum(votes) / len(votes), len(set(prompts))
    low, high = stats.wilson(value * distinct, distinct, level)
    if len(set(seeds)) > 1:
        resampled = stats.cluster_bootstrap([float(v) for v in votes], prompts, level, crossed=seeds)
        low, high = min(low, resampled[0]), max(high, resampled[1])
    return value, (low, high)
