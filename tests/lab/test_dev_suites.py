"""The lab's development suites: what a strength is chosen on never meets what it is measured on."""

from __future__ import annotations

import pytest

from resafe.eval import load_suite
from resafe.lab.suites import heldout_rows, suite_rows
from resafe.rows import keys, user_text


@pytest.mark.parametrize("name", ["lab_harm", "lab_borderline"])
def test_a_development_suite_holds_the_development_rows(name: str) -> None:
    cases = load_suite(f"{name}_dev").cases
    assert [user_text(c.messages) for c in cases] == [r["prompt"] for r in suite_rows(name, "dev")] and len(cases) == 80
    assert not {user_text(c.messages) for c in cases} & {user_text(c.messages) for c in load_suite(name).cases}


@pytest.mark.parametrize(("name", "suite"), [("heldout_skills", "lab_skills"), ("heldout_note", "lab_note")])
def test_more_held_out_rows_begin_with_the_few_and_hold_no_test_prompt(name: str, suite: str) -> None:
    rows = heldout_rows(name, 300)
    assert rows[:100] == heldout_rows(name) and not keys(rows) & {r["prompt"] for r in suite_rows(suite)}
