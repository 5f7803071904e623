"""Two systems on the same prompts: the difference, its interval and an exact test, corrected for multiplicity.

One target against another: Tango's score interval and McNemar's exact test; ratings and shares by `stats.paired_mean_difference`
and Wilcoxon's signed-rank test. Missing verdicts bound the difference (`bound_low`, `bound_high`); where these bounds lie
on both sides of zero no winner may be named (`decided` is False). Groups of training seeds (`compare_groups`): prompts and
seeds are crossed clusters of the changes, of the interval (stats.clustered_interval) as of the test (stats.crossed_test).
Beside it `p_models` is about these models alone: the exact sign test over prompts of their change summed over seeds (Wilcoxon's for
ratings), None where seeds share a baseline, as it is no test then. Holm's correction runs over suites x compared systems, within
one metric and judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from resafe.errors import ResafeError, suggest
from resafe.eval import stats
from resafe.eval.metrics import RATE, Scale, Vote, binary
from resafe.eval.pool import groups
from resafe.eval.results import Items, Results, Row

Pair = tuple[str, str, Vote | None, Vote | None]  # prompt, seed, before, after; None: unscored
Key = tuple[str, str, str]  # suite, metric, judge
CONDITIONAL = ("harmfulness_rate_coherent",)  # about the answers that are coherent on both sides


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
        asked = [v for before, after in pairs for v in _paired(results, before, after, (suite, metric, judge))]
        scored = [v for v in asked if None not in v]
        if scored:
            scale = results.items[pairs[0][0]][suite].scale(metric, judge)
            found = difference(scored, level, scale) | _bounds(asked, scale)
            if len(pairs) > len({before for before, _ in pairs}):
                found["p_models"] = None
            rows.append({"suite": suite, "metric": metric, "judge": judge, **who, **found})
    return rows


def _bounds(asked: Sequence[Pair], scale: Scale) -> Row:
    """The difference if missing verdicts were filled against it, and in its favour; and whether its sign stands."""
    missing = sum(None in v for v in asked)
    low, high = stats.bounds_difference([a for *_, a, _ in asked], [b for *_, b in asked], *scale)
    return {"missing": missing, "bound_low": low, "bound_high": high, "decided": not missing or not stats.crosses((low, high))}


def _change(pair: Pair) -> float:
    """after - before of a pair that was scored."""
    return float(pair[3] or 0) - float(pair[2] or 0)


def _shared(results: Results, pairs: Sequence[tuple[str, str]]) -> list[Key]:
    """What every target of the pairs was measured by, in the order of the first."""
    targets = [t for pair in pairs for t in pair]
    have = [{(r["suite"], r["metric"], r["judge"]): None for r in results.rows if r["target"] == t} for t in targets]
    return [key for key in have[0] if all(key in other for other in have)]


def _paired(results: Results, before: str, after: str, key: Key) -> list[Pair]:
    """What a judge said of both targets' answers. Raises ResafeError when they were asked different things."""
    suite, metric, judge = key
    one, two = results.items[before][suite], results.items[after][suite]
    _check_same_prompts(one, two, f"{before} and {after}", suite)
    columns = zip(one.prompts, one.column(metric, judge), two.column(metric, judge), _about(one, metric), _about(two, metric))
    return [(p, after, a, b) for p, a, b, first, second in columns if first and second]


def _about(items: Items, metric: str) -> Sequence[Vote | None]:
    """Which answers a metric is about: all, or those that are coherent."""
    everything: list[Vote | None] = [True] * len(items.prompts)
    return items.votes.get("coherence_rate|coherence", everything) if metric in CONDITIONAL else everything


def _check_same_prompts(one: Items, two: Items, who: str, suite: str) -> None:
    if (one.prompts, one.keys) != (two.prompts, two.keys):
        raise ResafeError(
            f"{who} did not answer the same prompts of {suite} ({len(one.prompts)} and {len(two.prompts)}): "
            "evaluate them in one run, or with the same suite, limit and seed."
        )


def difference(votes: Sequence[Pair], level: float = 0.95, scale: Scale = RATE) -> dict[str, Any]:
    """after - before over (prompt, seed) pairs: difference, low, high, p, p_models, n pairs, and yes lost and gained.

    Ratings and shares lose where the vote fell and gain where it rose.
    """
    prompts, seeds = {p for p, *_ in votes}, {s for _, s, *_ in votes}
    yes_or_no = binary([v for *_, a, b in votes for v in (a, b)]) and scale == RATE
    found, p_models = _binary(votes, level) if yes_or_no else _graded(votes, level, scale)
    change, low, high, p = found.difference, found.low, found.high, p_models
    if len(seeds) > 1:
        changes, clusters, crossed, width = [_change(v) for v in votes], [v[0] for v in votes], [v[1] for v in votes], scale[1] - scale[0]
        change = sum(changes) / len(changes)  # of pairs, as the interval: a prompt that was scored for more seeds counts for more
        low, high = stats.clustered_interval(changes, clusters, -width, width, level, crossed=crossed)
        p = stats.crossed_test(changes, clusters, crossed, -width, width)
    return {
        "difference": change, "low": low, "high": high, "p": p, "p_models": p_models, "n": len(votes), "prompts": len(prompts),
        "seeds": len(seeds), "lost": sum(_change(v) < 0 for v in votes), "gained": sum(_change(v) > 0 for v in votes),
    }  # fmt: skip


def _binary(votes: Sequence[Pair], level: float) -> tuple[stats.Difference, float]:
    """Tango's interval of the table averaged over seeds; exact test over prompts of their change summed over seeds."""
    table = stats.crosstab([bool(a) for *_, a, _ in votes], [bool(b) for *_, b in votes])
    share = len({p for p, *_ in votes}) / len(votes)
    net = _by_prompt(votes)
    p = stats.mcnemar_exact(sum(sum(x) < 0 for x in net), sum(sum(x) > 0 for x in net))
    return stats.tango(stats.Table(*(share * x for x in table)), level), p


def _graded(votes: Sequence[Pair], level: float, scale: Scale) -> tuple[stats.Difference, float]:
    """The paired difference of the means by prompt, and Wilcoxon's test of it."""
    found: dict[str, list[tuple[float, float]]] = {}
    for prompt, _, one, two in votes:
        found.setdefault(prompt, []).append((float(one or 0), float(two or 0)))
    before, after = ([sum(v[side] for v in pairs) / len(pairs) for pairs in found.values()] for side in (0, 1))
    return stats.paired_mean_difference(before, after, *scale, level), stats.wilcoxon_signed_rank(before, after)


def _by_prompt(votes: Sequence[Pair]) -> list[list[float]]:
    changes: dict[str, list[float]] = {}
    for vote in votes:
        changes.setdefault(vote[0], []).append(_change(vote))
    return list(changes.values())


def _with_holm(rows: list[Row]) -> list[Row]:
    families: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        families.setdefault((row["metric"], row["judge"]), []).append(row)
    for family in families.values():
        for row, p in zip(family, stats.holm([r["p"] for r in family])):
            row["p_holm"], row["p_models_holm"], row["family"] = p, None, len(family)
        own = [r for r in family if r["p_models"] is not None]
        for row, p in zip(own, stats.holm([r["p_models"] for r in own])):
            row["p_models_holm"] = p
    return rows
