"""Results survive saving, loading and merging."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resafe.errors import ResafeError
from resafe.eval import Results, TargetSpec, evaluate

Make = Callable[..., Path]
HELP = "First you take the lid off the jar."


def measured(file: Path, target: Any) -> Results:
    return evaluate([target], [file])


def test_loading_gives_back_what_was_saved(
    make_suite: Make, word_guard: list[str], scripted: Any, tmp_path: Path
) -> None:
    found = measured(make_suite(), scripted("t", {"q0": HELP, "q1": "?"}))
    found.save(tmp_path / "out")
    assert Results.load(tmp_path / "out") == found


def test_the_csv_has_a_line_per_row(make_suite: Make, word_guard: list[str], scripted: Any, tmp_path: Path) -> None:
    found = measured(make_suite(), scripted("t", {"q0": HELP}))
    found.save(tmp_path)
    with (tmp_path / "results.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert [(r["metric"], float(r["value"])) for r in rows] == [(r["metric"], r["value"]) for r in found.rows]


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResafeError, match="does not hold the results"):
        Results.load(tmp_path)


def test_merged_results_hold_all_targets(make_suite: Make, word_guard: list[str], scripted: Any) -> None:
    file = make_suite()
    one, two = measured(file, scripted("one")), measured(file, scripted("two", {"q0": HELP}))
    whole = Results.merge([one, two])
    assert whole.targets == ["one", "two"] and set(whole.meta["targets"]) == {"one", "two"}
    assert len(whole.rows) == len(one.rows) + len(two.rows)
    with pytest.raises(ResafeError, match="target 'one' is in two"):
        Results.merge([whole, one])


def test_merging_leaves_out_for_all_what_was_left_out_for_one(
    make_suite: Make, word_guard: list[str], scripted: Any
) -> None:
    file = make_suite()
    replies = {"q0": HELP, "q1": HELP, "q2": "?"}
    other = measured(file, scripted("other", replies))
    trained = measured(file, TargetSpec("trained", answers=scripted("x", replies), overlap={"mine": ["p0"]}))
    whole = Results.merge([other, trained])
    rows = [whole.row(t, "mine", "harmfulness_rate", "offline") for t in ("other", "trained")]
    counts = [(r["value"], r["n"], r["n_scored"]) for r in rows if r]
    assert counts == [(pytest.approx(1 / 8), 9, 8)] * 2
    assert whole.items["other"]["mine"] == whole.items["trained"]["mine"] and whole.meta["suites"]["mine"]["n"] == 9
    assert other.items["other"]["mine"].prompts[0] == "p0"  # the parts stay as they were
    agreed = [r["n"] for r in whole.agreement if r["target"] == "other"]
    assert agreed == [r["n"] for r in whole.agreement if r["target"] == "trained"]
