"""What an experiment's results are told as: a table, one sentence, one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.eval import Results, compare_groups, pooled, render, table
from resafe.eval.pool import groups
from resafe.eval.view import label
from resafe.files import write_json
from resafe.recipes.schema import Recipe

if TYPE_CHECKING:
    from rich.table import Table


def publish(recipe: Recipe, results: Results, folder: Path) -> tuple[Table, str, Path]:
    """Write report.html and comparisons.json beside the results; return the table, the sentence and the report's path."""
    comparisons = _comparisons(results)
    write_json(folder / "comparisons.json", comparisons)
    sentence = tell(results)
    html = render(results, comparisons, recipe.description or recipe.name, sentence, folder / "report.html")
    return table(results), sentence, html


def report(results: Results, html: Path) -> Path:
    """The HTML report of any evaluation."""
    return render(results, _comparisons(results), "resafe report", tell(results), html)


def compared(folders: Sequence[str], attack: str) -> dict[str, dict[str, Any]]:
    """Labels for BEFORE TUNED [REPAIRED...]: the first is untouched, the second fine-tuned, the rest mitigated."""
    labels: dict[str, dict[str, Any]] = {folders[0]: {"attack": "none", "mitigation": "none", "seed": 0}}
    for i, folder in enumerate(folders[1:]):
        labels[folder] = {"attack": attack, "mitigation": "none" if i == 0 else _called(folder), "seed": 0}
    return labels


def _called(target: str) -> str:
    """A folder's name, or a served model's."""
    kind, mark, rest = target.partition(":")
    served = bool(mark) and kind in ("chat", "batch", "openai")
    return rest.partition("@")[0] if served else Path(target).absolute().name


def _comparisons(results: Results) -> list[dict[str, Any]]:
    return [*compare_groups(results, "no mitigation"), *compare_groups(results, "before fine-tuning")]


def tell(results: Results) -> str:
    """One sentence on what happened to harmfulness: before, after fine-tuning, and with the best mitigation."""
    rates = _harm(results)
    before = rates.get(("none", "none"))
    broken = {attack: row for (attack, m), row in rates.items() if attack != "none" and m == "none"}
    if before is None or not broken:
        said = "; ".join(f"{_name(results, k)}: harmfulness {_rate(r)}" for k, r in rates.items())
        return f"{said}." if said else "No answer was judged for harm."
    said = f"Harmful answers: {_rate(before)} before fine-tuning, {_span(list(broken.values()))} after it"
    mended = {m: [rates[a, m] for a in broken if (a, m) in rates] for (_, m) in rates if m != "none"}
    worst = {m: max(rows, key=_value) for m, rows in mended.items() if len(rows) == len(broken)}
    if not worst:
        return f"{said}."
    best = min(worst, key=lambda m: (worst[m]["value"], worst[m]["high"]))
    if rivals := [m for m in worst if m != best and _open(worst[best], worst[m])]:
        return f"{said}. Missing verdicts leave open whether {best} or {' or '.join(rivals)} is best: no winner is named."
    on = "" if len(broken) == 1 else ", its worst attack"
    return f"{said}, {_rate(worst[best])} with {best}{on}; see over-refusal, coherence and utility beside it."


def _open(best: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether missing verdicts, filled in the worst way, would put the other one ahead."""
    missing = best["n_scored"] < best["n"] or other["n_scored"] < other["n"]
    return bool(missing and other["bound_low"] < best["bound_high"])


def _value(row: Mapping[str, Any]) -> float:
    return float(row["value"])


def _span(rows: list[Mapping[str, Any]]) -> str:
    low, high = min(rows, key=_value), max(rows, key=_value)
    return _rate(high) if low is high else f"{_rate(low)} to {_rate(high)}"


def _harm(results: Results) -> dict[tuple[str, str], Mapping[str, Any]]:
    """(attack, mitigation) -> pooled harmfulness row of the first harmful suite, by the exact judge or the classifier."""
    rows = [r for r in pooled(results) if r["metric"] == "harmfulness_rate" and r["value"] is not None]
    if not rows:
        return {}
    about = results.meta.get("suites", {})
    rows = [r for r in rows if not about.get(r["suite"], {}).get("of")]  # asked as it is, not a variant
    if not rows:
        return {}
    suite = rows[0]["suite"]
    judges = [r["judge"] for r in rows if r["suite"] == suite]
    judge = next((j for j in ("lab", "offline") if j in judges), judges[0])
    return {(r["attack"], r["mitigation"]): r for r in rows if (r["suite"], r["judge"]) == (suite, judge)}


def _name(results: Results, key: tuple[str, str]) -> str:
    return " / ".join(k for k in key if k != "none") or label(results, *key, groups(results)[key])


def _rate(row: Mapping[str, Any]) -> str:
    return f"{100 * row['value']:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
