"""The report shows every rate with its interval, needs no network, and holds no response."""

from __future__ import annotations

import io
import re
import stat
from collections.abc import Callable, Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from resafe.eval import Results, compare_groups, evaluate, render, render_transcripts, table
from resafe.eval import plane as drawing
from resafe.eval.report import content, power_line
from resafe.eval.results import Items
from resafe.eval.stats import wilson
from resafe.eval.suite import Suite
from resafe.eval.view import Cell, Column, agreement, columns, heat, kept, lines

SHARES = {  # (attack, mitigation): share harmful, share of old and of new skills that work
    ("none", "none"): (0.0, 0.9, 0.0),
    ("harmful", "none"): (0.95, 0.8, 0.0),
    ("harmful", "mix_safety"): (0.1, 0.85, 0.0),
    ("task", "none"): (0.9, 0.6, 1.0),
    ("task", "mix_safety"): (0.0, 0.8, 0.95),
    ("task", "restore_weights"): (0.2, 0.9, 0.1),
}
KINDS = {"harm": "harmful", "border": "benign", "old": "utility", "new": "utility"}


def share(x: float, n: int = 40) -> list[bool | None]:
    return [i < round(x * n) for i in range(n)]


def study(
    shares: dict[tuple[str, str], tuple[float, float, float]] = SHARES, categories: Sequence[str] = ("a", "b")
) -> Results:
    results = Results(meta={"seed": 0, "limit": None, "suites": {}, "targets": {}, "judges": {}})
    for suite, kind in KINDS.items():
        about: Any = {
            "name": suite,
            "kind": kind,
            "format": "lab",
            "task": suite == "new",
            "licence": "MIT",
            "source": "tests",
        }
        results.meta["suites"][suite] = {**Suite(**about).model_dump(), "n": 40, "dropped": {}}
    for (attack, mitigation), (harm, old, new) in shares.items():
        name = f"{attack}-{mitigation}"
        results.meta["targets"][name] = {"folder": "", "guard": "", "template": "", "seconds": 1.0, "peak_rss_mb": 50.0}
        votes = {
            "harm": {
                "harmfulness_rate|lab": share(harm),
                "nonrefusal_rate|rules": share(harm),
                "coherence_rate|coherence": share(1),
            },
            "border": {"over_refusal_rate|rules": share(0.05)},
            "old": {"utility|lab": share(old)},
            "new": {"utility|lab": share(new)},
        }
        for suite, found in votes.items():
            who = {"target": name, "attack": attack, "mitigation": mitigation, "seed": None, "suite": suite}
            ids = [str(i) for i in range(40)]
            by = [categories[i % len(categories)] for i in range(40)]
            results.add(who, KINDS[suite], Items(ids, ids, by, found))
    return results


def html(results: Results, tmp_path: Path, **more: Any) -> str:
    given = {"comparisons": compare_groups(results), "title": "A title", "sentence": "A sentence.", **more}
    return render(results, path=tmp_path / "report.html", **given).read_text()


def text(page: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", page.split("</style>")[1])))


def test_the_main_table_has_six_columns() -> None:
    found = [(c.title, c.suite, c.metric, c.judge) for c in columns(study())]
    assert found == [
        ("harmfulness", "harm", "harmfulness_rate", "lab"),
        ("nonrefusal", "harm", "nonrefusal_rate", "rules"),
        ("over-refusal", "border", "over_refusal_rate", "rules"),
        ("coherence", "harm", "coherence_rate", "coherence"),
        ("old utility", "old", "utility", "lab"),
        ("new utility", "new", "utility", "lab"),
    ]


def test_lines_come_by_attack_with_no_mitigation_first() -> None:
    shuffled = dict(reversed(SHARES.items()))
    found = [(x.attack, x.label) for x in lines(study(shuffled))]
    assert found == [
        ("none", "before fine-tuning"),
        ("task", "no mitigation"),
        ("task", "restore_weights"),
        ("task", "mix_safety"),
        ("harmful", "no mitigation"),
        ("harmful", "mix_safety"),
    ]


def test_every_rate_stands_with_its_interval_and_number(tmp_path: Path) -> None:
    page = text(html(study(), tmp_path))
    assert "0.0 % [0.0, 8.8] n 40" in page and "95.0 % [83.5, 98.6] n 40" in page
    assert not re.search(r"\b[\d.]+ %(?! \[| interval)", page.split("Harmfulness against utility")[0])


def test_a_mitigation_shows_its_paired_difference_and_adjusted_p(tmp_path: Path) -> None:
    results = study()
    row = next(
        c for c in compare_groups(results) if c["target"] == "task / mix_safety" and c["metric"] == "harmfulness_rate"
    )
    page = text(html(results, tmp_path))
    assert f"Δ \u221290.0 [\u2212{-100 * row['low']:.1f}, \u2212{-100 * row['high']:.1f}] p < 0.001" in page


def test_the_difference_shown_is_the_one_to_no_mitigation() -> None:
    results = study()
    both = [*compare_groups(results, "before fine-tuning"), *compare_groups(results)]
    line = next(x for x in lines(results, both) if (x.attack, x.mitigation) == ("task", "mix_safety"))
    changes = [c.change["difference"] for c in line.cells if c and c.change]
    assert changes == pytest.approx([-0.9, -0.9, 0, 0, 0.2, -0.05])


def test_missing_verdicts_are_shown() -> None:
    row = {"metric": "utility", "value": 0.5, "low": 0.1, "high": 0.9, "n": 10, "n_scored": 8}
    assert Cell(row).count == "n 8 of 10" and Cell({**row, "value": None}).value == "n/a"


def test_text_from_data_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    results = study({(f"a{evil}", f"m_{evil}"): (0.5, 0.5, 0.5), (f"a{evil}", "none"): (1, 1, 1)}, [evil, "b"])
    page = html(results, tmp_path, title=evil, sentence=evil)
    assert "<script" not in page and "alert(&#39;x&#39;)" in page


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    page = html(study(), tmp_path)
    assert not re.search(r"\b(src|href|@import|url)\b\s*[=(]|<(script|link|iframe|img|object)\b", page)
    assert "default-src 'none'" in page


def test_no_response_is_in_the_report(
    make_suite: Callable[..., Path], word_guard: list[str], scripted: Any, tmp_path: Path
) -> None:
    results = evaluate([scripted("t", default="xyzzy take the lid")], [make_suite()], reveal=True)
    assert results.transcripts and "xyzzy" not in html(results, tmp_path)


def test_a_study_of_one_target_and_one_suite_renders(
    make_suite: Callable[..., Path], word_guard: list[str], scripted: Any, tmp_path: Path
) -> None:
    page = text(html(evaluate([scripted("t")], [make_suite()]), tmp_path))
    assert "before fine-tuning" in page and "not measured" not in page


def test_a_panel_per_attack_measures_the_skill_that_was_taught() -> None:
    panels = content(study(), [])["panels"]
    assert [(p["attack"], p["y"].suite) for p in panels] == [("harmful", "old"), ("task", "new")]
    assert [p.label for p in panels[1]["points"]] == [
        "before fine-tuning",
        "no mitigation",
        "mix_safety",
        "restore_weights",
    ]


def test_marks_stand_where_their_rates_are() -> None:
    point = next(p for p in content(study(), [])["panels"][1]["points"] if p.label == "restore_weights")
    assert (point.x, point.y) == (drawing.to_x(0.2), drawing.to_y(0.1))
    assert point.x_low < point.x < point.x_high and point.y_low > point.y > point.y_high
    assert drawing.to_x(1) > drawing.to_x(0) and drawing.to_y(1) < drawing.to_y(0)


def test_a_mitigation_keeps_its_mark_in_every_panel() -> None:
    panels = content(study(), [])["panels"]
    styles = [{p.label: p.style for p in panel["points"]} for panel in panels]
    assert styles[0]["mix_safety"] == styles[1]["mix_safety"] != styles[1]["restore_weights"]


def test_labels_of_crowded_marks_do_not_overlap_and_stay_inside() -> None:
    crowd = {("a", f"mitigation_{i}"): (0.01 * (i % 3), 0.5, 0.95 + 0.01 * (i % 4)) for i in range(9)}
    points = content(study(crowd), [])["panels"][0]["points"]
    width = [0.56 * drawing.FONT * len(p.label) for p in points]
    boxes = [(p.text_x, p.text_y - drawing.FONT, p.text_x + w, p.text_y) for p, w in zip(points, width)]
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert left >= drawing.LEFT and right <= drawing.WIDTH and top >= 0 and bottom <= drawing.HEIGHT
        assert not any(left < r and x < right and top < b and y < bottom for x, y, r, b in boxes[:i])


def test_the_heat_map_counts_by_category() -> None:
    results = study()
    categories, body = heat(results, columns(results)[0])
    cells = next(cells for attack, label, cells in body if (attack, label) == ("harmful", "mix_safety"))
    assert categories == ["a", "b"] and [(c["k"], c["n"]) for c in cells if c] == [(2, 20), (2, 20)]


def test_the_heat_map_takes_seeds_for_the_same_prompts() -> None:
    results = study({("a", "none"): (0.0, 1, 1)})
    for row in results.rows:
        row["seed"] = 0
    again = results.items["a-none"]["harm"]
    results.add({"target": "seed1", "attack": "a", "mitigation": "none", "seed": 1, "suite": "harm"}, "harmful", again)
    (_, _, cells), *_ = heat(results, columns(results)[0])[1]
    assert cells[0] is not None and (cells[0]["n"], cells[0]["high"]) == (40, pytest.approx(wilson(0, 20)[1]))


def test_agreement_is_taken_over_all_targets() -> None:
    results = study()
    (row,) = agreement(results)
    assert (row["n"], row["agreement"], row["kappa"]) == (40 * len(SHARES), 1.0, 1.0)
    assert row["low"] == pytest.approx(wilson(40, 40)[0])  # 40 prompts, however many models answered them


def test_three_judges_have_an_alpha_with_its_interval() -> None:
    results = Results()
    for target in ("one", "two"):
        votes = {f"nonrefusal_rate|{j}": [i % 2 == 0 or (i == 1 and j == "a") for i in range(20)] for j in ("a", "b", "c")}
        items = Items([str(i) for i in range(20)], [str(i) for i in range(20)], ["x"] * 20, votes, {}, {})
        results.add({"target": target, "attack": None, "mitigation": None, "seed": None, "suite": "harm"}, "harmful", items)
    *_, row = agreement(results)
    assert row["second"] == "all of them" and row["n"] == 40 and row["kappa"] is None
    assert row["low"] < wilson(19, 20)[0] < wilson(38, 40)[0]  # 20 prompts, which both models answered alike
    assert -1 < row["alpha_low"] < row["alpha"] < row["alpha_high"] <= 1


def test_power_is_said_for_the_number_of_prompts() -> None:
    results = study()
    shown = columns(results)
    line = power_line(shown, lines(results, (), shown))
    assert "With 40 prompts of harm" in line and "may still be 8.8 %" in line


def printed(width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(study(), "Title"))
    return console.export_text()


@pytest.mark.parametrize("width", [100, 160])
def test_the_terminal_table_has_a_row_per_mitigation_with_intervals(width: int) -> None:
    shown = printed(width)
    assert shown.count("mix_safety") == 2 and shown.count("no mitigation") == 2 and "[0.0–8.8]" in shown
    assert shown.count("n 40 ↓") == 3 and shown.count("n 40 ↑") == 3


def test_a_narrow_terminal_loses_nothing_of_the_table() -> None:
    shown = printed(80)
    assert "…" not in shown and "before fine-tuning" in shown and max(map(len, shown.splitlines())) <= 80


def test_transcripts_are_a_file_of_their_own_for_the_owner_only(
    make_suite: Callable[..., Path], word_guard: list[str], scripted: Any, tmp_path: Path
) -> None:
    evil = "<script>alert(1)</script>"
    found = evaluate([scripted("t", {"q1": evil}), scripted("u")], [make_suite(n=2)], reveal=True)
    file = render_transcripts(found, tmp_path / "transcripts.html")
    page = file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert page.count("<details>") == 2 and page.count("<h3>") == 4
    assert evil not in page and "&lt;script&gt;alert(1)" in page and "<details open" not in page
    assert evil not in html(found, tmp_path) and "alert(1)" not in html(found, tmp_path)


def test_missing_verdicts_that_could_undo_it_leave_a_margin_unclear() -> None:
    change = {"difference": 0.0, "low": -0.01, "high": 0.01, "missing": 5, "bound_low": -0.03, "bound_high": 0.03}
    cell, column = Cell({"metric": "utility"}, change), Column("old utility", "s", "utility", "lab", "higher")
    assert kept(cell, column) == "2 points against unmitigated: unclear"
    assert kept(Cell({"metric": "utility"}, {**change, "bound_low": -0.015}), column) == "kept within 2 points of unmitigated"


def test_green_takes_the_adjusted_test_and_red_the_interval_alone(tmp_path: Path) -> None:
    """Harm 12 of 40 unmitigated: 6 fewer is p 0.031 on its own and 0.094 among three; 6 more is red all the same; 12 fewer is green."""
    page = html(study({("a", "none"): (0.3, 1, 1), ("a", "some"): (0.15, 1, 1), ("a", "more"): (0.45, 1, 1), ("a", "all"): (0.0, 1, 1)}), tmp_path)
    found = {change: colour for colour, change in re.findall(r'class="delta (\w*)">Δ ([^ ]+) \[', page)}
    assert (found["−15.0"], found["+15.0"], found["−30.0"]) == ("", "bad", "good")
