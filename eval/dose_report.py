"""The dose-response of a search for people: a table for a terminal, and one HTML page without scripts or network access."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.eval import plane, view
from resafe.eval.dose import LERP, LIMIT, Found, Point, rate, shift
from resafe.eval.results import Row
from resafe.files import write_text

if TYPE_CHECKING:
    from rich.table import Table

TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
ARROWS = {"higher": "\u2191", "lower": "\u2193"}
STYLES = {"harmfulness": "bad", "nonrefusal": "c4", "over-refusal": "c1", "coherence": "c3", "utility": "c2"}


@dataclass(frozen=True)
class Mark:
    """A measured rate in drawing coordinates, with its error bars."""

    x: float
    y: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    path: str
    title: str


@dataclass(frozen=True)
class Series:
    """Marks that belong together, joined by a line."""

    name: str
    style: str
    marks: list[Mark]

    @property
    def line(self) -> str:
        return "M" + "L".join(f"{m.x} {m.y}" for m in self.marks)


def sections(found: Found) -> list[tuple[str, list[tuple[str, str, Point]]]]:
    """(heading, lines): each line a label, a note and its point. LERP stands below whatever was searched."""
    first = [("before fine-tuning", "", found.before)] if found.before else []
    parts = [("references", [(n, t, p) for n, t, p in [*first, ("as fine-tuned", "", found.tuned)] if p])]
    parts.append((f"{found.method}, by {found.parameter}", [(_dose(p), "chosen" if p is found.chosen else "", p) for p in found.points]))
    if found.method != LERP:
        parts.append(("LERP, by strength", [(_dose(p), "LERP at that utility" if p is found.matched else "", p) for p in found.lerp]))
    return parts


def table(found: Found) -> Table:
    """Every dose with each rate and its 95 % interval, the paired change of utility, and whether that was kept."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    caption = f"% of prompts [95 % interval]; change of utility in points, paired; kept: its whole interval above \u2212{100 * found.margin:g}; named: shown to cost more than {100 * LIMIT:g} points of it. Chosen by its harm on these prompts: for an unbiased number measure that dose on others"
    out = Table(caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    out.add_column("dose", no_wrap=True)
    for c in found.columns:
        out.add_column(f"{c.title} {ARROWS[c.better]}", justify="right", overflow="fold")
    out.add_column("change of utility", justify="right", no_wrap=True)
    out.add_column("")
    for heading, lines in sections(found):
        out.add_row(Text(heading, style="bold"))
        for name, note, p in lines:
            label = Text(f"  {name}", style="bold" if note else "")
            cells = [_cell(p.rates.get(c.title)) for c in found.columns]
            last = p is lines[-1][2]
            out.add_row(label, *cells, _change(p), _kept(p, found.margin), end_section=last and not note)
            if note:
                out.add_row(Text(f"  \u2514 {note}", style="dim"), end_section=last)
    return out


def render(found: Found, meta: dict[str, Any], title: str, path: Path) -> Path:
    """Write the page; `meta` is that of the results. No response is ever part of it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("resafe.eval", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("search.html.jinja").render(
        found=found, title=title, meta=meta, sections=sections(found), cell=_plain, change=_change, kept=_kept, drawing=plane,
        limit=LIMIT, ticks=[{"at": plane.to_x(t), "up": plane.to_y(t), "label": f"{100 * t:.0f}"} for t in TICKS],
        curves=curves(found), frontier=frontier(found),
    )  # fmt: skip
    return write_text(Path(path), page)


def curves(found: Found) -> list[dict[str, Any]]:
    """A panel per method: every rate against the dose, doses at equal distances, the fine-tuned model at 0."""
    lines = [(found.method, found.parameter, found.points)]
    if found.method != LERP:
        lines.append(("LERP (restore_weights)", "strength", found.lerp))
    panels = []
    for name, parameter, points in lines:
        shown = [found.tuned, *points]
        places = [plane.to_x(i / (len(shown) - 1)) for i in range(len(shown))]
        series = [_series(c.title, i, shown, places) for i, c in enumerate(found.columns)]
        doses = [{"x": x, "label": "none" if p.dose is None else f"{p.dose:g}"} for x, p in zip(places, shown)]
        panels.append({"name": name, "parameter": parameter, "series": series, "doses": doses})
    return panels


def _series(column: str, shape: int, points: Sequence[Point], places: Sequence[float]) -> Series:
    marks = []
    for x, p in zip(places, points):
        if (row := p.rates.get(column)) is not None and row["value"] is not None:
            y = plane.to_y(row["value"])
            path = plane.outline(plane.SHAPES[shape % len(plane.SHAPES)], x, y, 3.5)
            marks.append(Mark(x, y, x, x, plane.to_y(row["low"]), plane.to_y(row["high"]), path, f"{_name(p)}: {column} {rate(p, column)}"))
    return Series(column, STYLES[column], marks)


def frontier(found: Found) -> list[Series]:
    """Utility against harmfulness: what each method offers, from the fine-tuned model on. The better one is further up and left."""
    offered = [(found.method, "c0", 0, found.points)]
    if found.method != LERP:
        offered.append(("LERP (restore_weights)", "c1", 1, found.lerp))
    out = []
    for name, style, shape, points in offered:
        marks = []
        for p in (found.tuned, *points):
            h, u = p.rates["harmfulness"], p.rates["utility"]
            x, y = plane.to_x(h["value"]), plane.to_y(u["value"])
            size = 6.5 if p is found.chosen or p is found.matched else 3.5
            title = f"{_name(p)}: harmfulness {rate(p, 'harmfulness')}, utility {rate(p, 'utility')}"
            ends = plane.to_x(h["low"]), plane.to_x(h["high"]), plane.to_y(u["low"]), plane.to_y(u["high"])
            marks.append(Mark(x, y, *ends, plane.outline(plane.SHAPES[shape], x, y, size), title))
        out.append(Series(name, style, marks))
    return out


def _name(point: Point) -> str:
    return point.target if point.dose is not None else "as fine-tuned"


def _dose(point: Point) -> str:
    return f"{point.dose:g}"


def _plain(row: Row | None) -> str:
    """A rate with its interval, and how many were scored where not all were."""
    if row is None or row["value"] is None:
        return "not measured"
    missing = "" if row["n_scored"] == row["n"] else f", {row['n_scored']} of {row['n']} scored"
    return f"{view.percent(row['value'])} [{view.percent(row['low'])}, {view.percent(row['high'])}]{missing}"


def _cell(row: Row | None) -> Any:
    from rich.text import Text

    return Text(_plain(row).replace(", ", "\u2013", 1))


def _change(point: Point) -> str:
    return shift(point.changes["utility"]) if "utility" in point.changes else ""


def _kept(point: Point, margin: float) -> str:
    """What decides on a dose: whether utility is kept, and what else it costs."""
    return ", ".join([point.kept(margin), *(f"costs {c}" for c in point.spoilt)]) if point.method else ""
