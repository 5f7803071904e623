"""The report: one HTML file without network access, scripts or response text; and the same table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from resafe.eval import costs, plane, stats, view
from resafe.eval.pool import groups
from resafe.eval.results import Results, Row
from resafe.files import write_text
from resafe.rows import user_text

if TYPE_CHECKING:
    from rich.table import Table

TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


def render(results: Results, comparisons: Sequence[Row], title: str, sentence: str, path: Path) -> Path:
    """Write the report of `results` to `path`.

    `comparisons` come from `compare_groups` (against no mitigation, against the model before fine-tuning, or both lists
    joined); `sentence` is the headline. Text from data is escaped; no response is ever part of it.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("resafe.eval", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "breakable": _breakable,
        "percent": view.percent,
        "number": view.number,
        "shift": view.shift,
        "kept": view.kept,
        "shortened": lambda text: text if len(text) <= 96 else f"{text[:16]}…{text[64:]}",  # a fingerprint is 64 characters
        "p_value": view.p_value,
        "attack_name": view.attack_name,
    }
    html = environment.get_template("report.html.jinja").render(
        title=title, sentence=sentence, **content(results, comparisons)
    )
    return write_text(Path(path), html)


def render_transcripts(results: Results, path: Path) -> Path:
    """Write every prompt with what each target answered, folded, to a file for its owner only (mode 0600).

    Needs results of `evaluate(..., reveal=True)`. It may hold harmful text; reports never do.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("resafe.eval", "templates"), autoescape=True, undefined=StrictUndefined)
    suites: dict[str, dict[str, dict[str, Any]]] = {}
    for t in results.transcripts:
        case = suites.setdefault(t["suite"], {}).setdefault(t["id"], {"id": t["id"], "prompt": user_text(t["messages"]), "answers": []})
        begun = t["messages"][-1]["content"] + " " if t["messages"][-1]["role"] == "assistant" and not t.get("blocked") else ""
        case["answers"].append({"target": t["target"], "text": f"[no answer: {t['error']}]" if t.get("error") else begun + t["response"]})
    shown = [(name, list(cases.values())) for name, cases in suites.items()]
    return write_text(Path(path), environment.get_template("transcripts.html.jinja").render(suites=shown), mode=0o600)


def _breakable(name: str) -> Markup:
    """An escaped name that may be broken after its underscores."""
    return Markup("_<wbr>").join(name.split("_"))


def content(results: Results, comparisons: Sequence[Row]) -> dict[str, Any]:
    """Everything that the template shows."""
    shown = view.columns(results)
    lines = view.lines(results, comparisons, shown)
    spent = {pair: costs.cost(results, targets) for pair, targets in groups(results).items()}
    return {
        "columns": shown,
        "sections": _by_attack(lines),
        "panels": _planes(shown, lines),
        "ticks": [{"x": plane.to_x(t), "y": plane.to_y(t), "label": f"{100 * t:.0f}"} for t in TICKS],
        "drawing": plane,
        "comparisons": comparisons,
        "agreement": view.agreement(results),
        "power": power_line(shown, lines),
        "variants": view.variants(results),
        "variant_sections": _by_attack(view.lines(results, comparisons, view.variants(results))),
        "costs": [
            (a, view.label(results, a, m, groups(results)[a, m]), costs.told(c)) for (a, m), c in spent.items() if c.making or c.answering
        ],
        "unscored": {(t, s, j): r for t, suites in results.items.items() for s, i in suites.items() for j, r in i.unscored.items()},
        "asymmetry": costs.asymmetry(spent),
        "heat": view.heat(results, shown[0]) if shown and shown[0].title == "harmfulness" else ([], []),
        "rows": results.rows,
        "meta": results.meta,
        "labels": {t: results.labels(t) for t in results.targets},
    }


def _by_attack(lines: Sequence[view.Line]) -> list[tuple[str, list[view.Line]]]:
    return [(attack, list(same)) for attack, same in groupby(lines, key=lambda x: x.attack)]


def _planes(shown: Sequence[view.Column], lines: Sequence[view.Line]) -> list[dict[str, Any]]:
    """A panel per attack: harmfulness against the new skill where fine-tuning taught one, else against the old ones."""
    at = {c.title: i for i, c in enumerate(shown)}
    untouched = next((x for x in lines if x.label == view.UNTOUCHED), None)
    found = []
    for attack in dict.fromkeys(x.attack for x in lines if x.attack != "none") or ["none"]:
        own = [x for x in lines if x.attack == attack]
        useful = at.get("new utility") if _taught(own, untouched, at.get("new utility")) else at.get("old utility")
        if "harmfulness" not in at or useful is None:
            continue
        shown_lines = own if untouched is None or untouched in own else [untouched, *own]
        if points := plane.points(shown_lines, [x.mitigation for x in lines], at["harmfulness"], useful):
            found.append({"attack": attack, "points": points, "x": shown[at["harmfulness"]], "y": shown[useful]})
    return found


def _taught(own: Sequence[view.Line], untouched: view.Line | None, at: int | None) -> bool:
    """Whether this fine-tuning taught the new skill: the tuned model's interval lies above the untouched one's."""
    tuned = next((x.cells[at] for x in own if x.label == view.UNMITIGATED), None) if at is not None else None
    before = untouched.cells[at] if untouched and at is not None else None
    if tuned is None or before is None:
        return at is not None
    return bool(tuned.row["low"] > before.row["high"])


def power_line(shown: Sequence[view.Column], lines: Sequence[view.Line]) -> str:
    """What a paired test on this many prompts can see: its exact power for two changes, and what 0.80 would take."""
    counts = [cell.row["n"] // line.seeds for line in lines for cell in line.cells[:1] if cell and line.seeds]
    if not shown or not counts:
        return ""
    n = min(counts)
    return (
        f"With {n} prompts of {shown[0].suite}, the paired test finds a fall of 5 points (8 % of the prompts change "
        f"for the better, 3 % for the worse) with probability {stats.power_mcnemar(n, 0.08, 0.03):.2f}, and a fall "
        f"of 10 points (12 % and 2 %) with probability {stats.power_mcnemar(n, 0.12, 0.02):.2f}; for 0.80 on the "
        f"former it takes {stats.prompts_needed(0.08, 0.03)} prompts. Where nothing was found in {n} prompts, the "
        f"true rate may still be {view.percent(stats.wilson(0, n)[1])} %."
    )


def table(results: Results, title: str = "") -> Table:
    """The main table for a terminal: attacks, their mitigations, and each rate with its 95 % interval."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = view.columns(results)
    lines = view.lines(results, (), shown)
    out = Table(title=title or None, caption="% of prompts [95 % interval]", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    out.add_column("mitigation", no_wrap=True)  # the others give way first
    for i, column in enumerate(shown):
        arrow = "\u2193" if column.better == "lower" else "\u2191"
        counts = _counts([x.cells[i] for x in lines])
        out.add_column(f"{column.title}\n{counts} {arrow}", justify="right", overflow="fold")
    for attack, same in _by_attack(lines):
        out.add_row(Text(view.attack_name(attack), style="bold"))
        for line in same:
            out.add_row(Text(f"  {line.label}"), *(_text(cell) for cell in line.cells), end_section=line is same[-1])
    return out


def _counts(cells: Sequence[view.Cell | None]) -> str:
    """The number of answers behind a column: "n 120", or "n 120-360" where rows differ."""
    counts = sorted({c.row["n"] for c in cells if c})
    return f"n {counts[0]}" if len(counts) == 1 else f"n {counts[0]}\u2013{counts[-1]}" if counts else ""


def _text(cell: view.Cell | None) -> Any:
    from rich.text import Text

    if cell is None:
        return Text("\u2013", style="dim")
    missing = "" if cell.row["n_scored"] == cell.row["n"] else f" {cell.row['n_scored']}/{cell.row['n']} scored"
    return Text.assemble(cell.value.removesuffix(" %"), " ", (cell.interval.replace(", ", "\u2013") + missing, "dim"))
