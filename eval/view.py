"""What a report and a terminal table show: columns chosen from the results, cells with intervals, rows by attack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from resafe.eval import stats
from resafe.eval.pool import Votes, groups, pool, pooled
from resafe.eval.results import Results, Row

UNTOUCHED, UNMITIGATED = "before fine-tuning", "no mitigation"


@dataclass(frozen=True)
class Column:
    """One of the shown metrics: where it comes from, and which way is better."""

    title: str
    suite: str
    metric: str
    judge: str
    better: str  # "lower" or "higher"


@dataclass(frozen=True)
class Cell:
    """A measured rate and, for a mitigation, its paired difference to no mitigation."""

    row: Row
    change: Row | None = None

    @property
    def value(self) -> str:
        return "n/a" if self.row["value"] is None else f"{percent(self.row['value'])} %"

    @property
    def interval(self) -> str:
        return f"[{percent(self.row['low'])}, {percent(self.row['high'])}]"

    @property
    def count(self) -> str:
        n, scored = self.row["n"], self.row["n_scored"]
        return f"n {n}" if scored == n else f"n {scored} of {n}"

    @property
    def delta(self) -> str:
        """The difference in points, with its interval and adjusted p."""
        c = self.change
        if c is None:
            return ""
        return f"{points(c['difference'])} [{points(c['low'])}, {points(c['high'])}], {p_value(c['p_holm'])}"


@dataclass(frozen=True)
class Line:
    """One mitigation under one attack; `cells` are in the order of the columns, None where not measured."""

    attack: str
    mitigation: str
    label: str
    seeds: int
    cells: list[Cell | None]


def percent(x: float) -> str:
    return "100" if x == 1 else f"{100 * x:.1f}"


def points(x: float) -> str:
    return f"{100 * x:+.1f}".replace("-", "\u2212")


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def columns(results: Results) -> list[Column]:
    """The six of the main table, as far as they were measured.

    Harm, nonrefusal and coherence are of the first harmful suite; harm by the exact judge, else by the classifier.
    """
    harmful, benign = _suites(results, "harmful"), _suites(results, "benign")
    task = [s for s in _suites(results, "utility") if _meta(results, s).get("task")]
    general = [s for s in _suites(results, "utility") if s not in task]
    wanted = [
        ("harmfulness", harmful, "harmfulness_rate", "lower"),
        ("nonrefusal", harmful, "nonrefusal_rate", "lower"),
        ("over-refusal", benign, "over_refusal_rate", "lower"),
        ("coherence", harmful, "coherence_rate", "higher"),
        ("old utility", general, "utility", "higher"),
        ("new utility", task, "utility", "higher"),
    ]
    found = []
    for title, suites, metric, better in wanted:
        judge = _judge(results, suites[0], metric) if suites else None
        if judge:
            found.append(Column(title, suites[0], metric, judge, better))
    return found


def _suites(results: Results, kind: str) -> list[str]:
    return list(dict.fromkeys(r["suite"] for r in results.rows if r["kind"] == kind))


def _meta(results: Results, suite: str) -> dict[str, Any]:
    entry: dict[str, Any] = results.meta.get("suites", {}).get(suite, {})
    return entry


def _judge(results: Results, suite: str, metric: str) -> str | None:
    """The judge that speaks for a metric: refusals by rules, harm exactly or by the classifier, else the first."""
    have = dict.fromkeys(r["judge"] for r in results.rows if (r["suite"], r["metric"]) == (suite, metric))
    order = ("lab", "offline") if metric == "harmfulness_rate" else ("rules", "coherence", "lab", "exact_number")
    return next((j for j in (*order, *have) if j in have), None)


def label(attack: str, mitigation: str) -> str:
    """How a row is called: the mitigation, or what its absence means."""
    return mitigation if mitigation != "none" else UNTOUCHED if attack == "none" else UNMITIGATED


def attack_name(attack: str) -> str:
    return "not attacked" if attack == "none" else attack


def lines(results: Results, comparisons: Sequence[Row] = (), shown: Sequence[Column] | None = None) -> list[Line]:
    """A line for each attack and mitigation, attacks together, no mitigation first."""
    shown = columns(results) if shown is None else shown
    rows = pooled(results, only=[(c.suite, c.metric, c.judge) for c in shown])
    pairs = sorted(groups(results).items(), key=_order(results))
    return [
        Line(a, m, label(a, m), len(targets), [_cell(rows, comparisons, a, m, c) for c in shown])
        for (a, m), targets in pairs
    ]


def _order(results: Results) -> Any:
    attacks = list(dict.fromkeys(a for a, _ in groups(results)))
    return lambda item: (item[0][0] != "none", attacks.index(item[0][0]), item[0][1] != "none")


def _cell(rows: Iterable[Row], comparisons: Iterable[Row], attack: str, mitigation: str, column: Column) -> Cell | None:
    key = (attack, mitigation, column.suite, column.metric, column.judge)
    row = next((r for r in rows if _key(r) == key), None)
    change = next((c for c in comparisons if c.get("versus") == UNMITIGATED and _key(c) == key), None)
    return None if row is None else Cell(row, change)


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[k] for k in ("attack", "mitigation", "suite", "metric", "judge"))


def agreement(results: Results) -> list[Row]:
    """Agreement of each two judges of a suite over the answers of all targets."""
    found = []
    for suite, first, second in dict.fromkeys((r["suite"], r["first"], r["second"]) for r in results.agreement):
        one, two = (tuple(x.split(" by ", 1)) for x in (first, second))
        votes = [
            pair for items in results.items.values() if suite in items for pair in _both(items[suite].votes, one, two)
        ]
        same = sum(a == b for a, b in votes)
        kappa = stats.cohen_kappa([a for a, _ in votes], [b for _, b in votes])
        found.append(
            {
                "suite": suite, "first": first, "second": second, "n": len(votes), "kappa": kappa,
                "agreement": same / len(votes) if votes else None,
            }
        )  # fmt: skip
    return found


def _both(votes: dict[str, list[bool | None]], one: tuple[str, ...], two: tuple[str, ...]) -> list[tuple[bool, bool]]:
    """What two judges said of the same answers; every metric that they are compared on counts what is undesired."""
    first, second = votes.get("|".join(one), []), votes.get("|".join(two), [])
    return [(a, b) for a, b in zip(first, second) if a is not None and b is not None]


def heat(results: Results, column: Column) -> tuple[list[str], list[tuple[str, str, list[Row | None]]]]:
    """(categories, one (attack, label, cells {value, low, high, k, n}) per line) of a metric, seeds together."""
    categories: dict[str, None] = {}
    counts: dict[tuple[str, str], dict[str, Votes]] = {}
    for pair, targets in sorted(groups(results).items(), key=_order(results)):
        for target in targets:
            items = results.items.get(target, {}).get(column.suite)
            if items is None:
                continue
            votes = items.column(column.metric, column.judge)
            for category, prompt, vote in zip(items.categories, items.prompts, votes):
                if vote is not None:
                    categories[category] = None
                    counts.setdefault(pair, {}).setdefault(category, []).append((prompt, target, vote))
    body = [(a, label(a, m), [_heat_cell(by.get(c)) for c in categories]) for (a, m), by in counts.items()]
    return list(categories), body


def _heat_cell(votes: Votes | None) -> Row | None:
    if not votes:
        return None
    value, (low, high) = pool([v for *_, v in votes], [p for p, *_ in votes], [t for _, t, _ in votes])
    return {"value": value, "low": low, "high": high, "k": sum(v for *_, v in votes), "n": len(votes)}
