"""Two systems on the same prompts: the difference, its interval and an exact test, corrected for multiplicity.

One target against another: Newcombe's paired interval and McNemar's exact test. Groups of training seeds
(`compare_groups`): the paired table averaged over seeds gives Newcombe's interval, joined with a bootstrap over
prompts and seeds; the test is the exact sign test over prompts of the change summed over seeds, which is McNemar's
when there is one seed. Holm's correction runs over suites x compared systems, within one metric and judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from resafe.errors import ResafeError, suggest
from resafe.eval import stats
from resafe.eval.pool import groups
from resafe.eval.results import Items, Results, Row

Pair = tuple[str, str, bool, bool]  # prompt, seed, before, after
Key = tuple[str, str, str]  # suite, metric, judge


def compare(results: Results, baseline: str, others: Sequence[str] | None = None, level: float = 0.95) -> list[Row]:
    """Every other target (or `others`) against the target `baseline`, for each suite, metric and judge that both have.

    Raises ResafeError for unknown targets and where the two did not answer the same prompts.
    """
    for name in (baseline, *(others or ())):
        if name not in results.targets:
            raise ResafeError(f"no target is named '{name}' in these results. {suggest(name, results.targets)}")
    rows = []
    for other in [t for t in results.targets if t != baseline] if others is None else others:
        attack, mitigation, seed = results.labels(other)
        who = {
            "target": other,
            "baseline": baseline,
            "versus": baseline,
            "attack": attack,
            "mitigation": mitigation,
            "seed": seed,
        }
        rows += _compared(results, [(baseline, other)], who, level)
    return _with_holm(rows)


def compare_groups(
    results: Results, to: Literal["no mitigation", "before fine-tuning"] = "no mitigation", level: float = 0.95
) -> list[Row]:
    """Every (attack, mitigation), its seeds together, against the same attack unmitigated or the untouched model.

    Targets are paired by training seed; a baseline without a seed of its own serves all.
    """
    found = groups(results)
    rows = []
    for (attack, mitigation), targets in found.items():
        base = (attack, "none") if to == "no mitigation" else ("none", "none")
        if base == (attack, mitigation) or base not in found:
            continue
        pairs = list(_by_seed(results, found[base], targets))
        who = {
            "target": f"{attack} / {mitigation}",
            "baseline": " / ".join(base),
            "versus": to,
            "attack": attack,
            "mitigation": mitigation,
        }
        rows += _compared(results, pairs, {**who, "seed": None}, level)
    return _with_holm(rows)


def _by_seed(results: Results, baselines: list[str], targets: list[str]) -> Iterator[tuple[str, str]]:
    by_seed = {results.labels(b)[2]: b for b in baselines}
    for target in targets:
        seed = results.labels(target)[2]
        if seed not in by_seed and len(baselines) > 1:
            raise ResafeError(
                f"{target} has training seed {seed}, its baselines {', '.join(map(str, by_seed))}: label them alike."
            )
        yield by_seed.get(seed, baselines[0]), target


def _compared(results: Results, pairs: Sequence[tuple[str, str]], who: Row, level: float) -> list[Row]:
    rows = []
    for suite, metric, judge in _shared(results, pairs):
        votes = [v for before, after in pairs for v in _paired(results, before, after, (suite, metric, judge))]
        if votes:
            rows.append({"suite": suite, "metric": metric, "judge": judge, **who, **difference(votes, level)})
    return rows


def _shared(results: Results, pairs: Sequence[tuple[str, str]]) -> list[Key]:
    """What every target of the pairs was measured by, in the order of the first."""
    targets = [t for pair in pairs for t in pair]
    have = [{(r["suite"], r["metric"], r["judge"]): None for r in results.rows if r["target"] == t} for t in targets]
    return [key for key in have[0] if all(key in other for other in have)]


def _paired(results: Results, before: str, after: str, key: Key) -> list[Pair]:
    """The prompts that a judge scored for both targets. Raises ResafeError when they were asked different things."""
    suite, metric, judge = key
    one, two = results.items[before][suite], results.items[after][suite]
    _check_same_prompts(one, two, f"{before} and {after}", suite)
    both = zip(one.prompts, one.column(metric, judge), two.column(metric, judge))
    return [(prompt, after, a, b) for prompt, a, b in both if a is not None and b is not None]


def _check_same_prompts(one: Items, two: Items, who: str, suite: str) -> None:
    if (one.prompts, one.keys) != (two.prompts, two.keys):
        raise ResafeError(
            f"{who} did not answer the same prompts of {suite} ({len(one.prompts)} and {len(two.prompts)}): "
            "evaluate them in one run, or with the same suite, limit and seed."
        )


def difference(votes: Sequence[Pair], level: float = 0.95) -> dict[str, Any]:
    """after - before over (prompt, seed) pairs: difference, low, high, p, n pairs, and yes lost and gained."""
    table = stats.crosstab([a for *_, a, _ in votes], [b for *_, b in votes])
    prompts, seeds = {p for p, *_ in votes}, {s for _, s, *_ in votes}
    share = len(prompts) / len(votes)
    found = stats.newcombe(stats.Table(*(share * x for x in table)), level)
    low, high = found.low, found.high
    if len(seeds) > 1:
        changes = [float(b) - float(a) for _, _, a, b in votes]
        resampled = stats.cluster_bootstrap(changes, [v[0] for v in votes], level, crossed=[v[1] for v in votes])
        low, high = min(low, resampled[0]), max(high, resampled[1])
    return {
        "difference": found.difference, "low": low, "high": high, "p": _sign_test(votes), "n": len(votes),
        "prompts": len(prompts), "seeds": len(seeds), "lost": int(table.before), "gained": int(table.after),
    }  # fmt: skip


def _sign_test(votes: Sequence[Pair]) -> float:
    """Exact test over prompts of the sign of their change summed over seeds."""
    net: dict[str, int] = {}
    for prompt, _, before, after in votes:
        net[prompt] = net.get(prompt, 0) + after - before
    return stats.mcnemar_exact(sum(x < 0 for x in net.values()), sum(x > 0 for x in net.values()))


def _with_holm(rows: list[Row]) -> list[Row]:
    families: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        families.setdefault((row["metric"], row["judge"]), []).append(row)
    for family in families.values():
        for row, p in zip(family, stats.holm([r["p"] for r in family])):
            row["p_holm"], row["family"] = p, len(family)
    return rows
