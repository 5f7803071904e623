"""The table of restorations is the one that the committed results give, and says of them what their numbers say."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.lab_restoration import BEGIN, END, LERP, PAGE, RESULT, markdown
from resafe.models import read_config

FOUND = read_config(RESULT)


def test_the_table_is_the_one_that_the_committed_results_give() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == markdown(FOUND).strip()


def test_every_attack_has_a_dose_response_of_every_method_with_intervals() -> None:
    attacks = {r["attack"] for r in FOUND["test"]}
    methods = {c["method"] for c in FOUND["choices"]}
    assert len(attacks) == 6 and {LERP, "resta", "lox", "safe_lora"} <= methods
    for attack in attacks:
        for method in methods:
            assert len([r for r in FOUND["curve"] if (r["attack"], r["method"]) == (attack, method)]) >= 5, (attack, method)
    for row in FOUND["curve"]:
        for column in ("harm", "over-refusal", "coherence", "utility"):
            value, low, high = row[column]
            assert 0 <= low <= value <= high <= 1


def _row(attack: str, method: str, difference: list[float], p: float) -> dict[str, Any]:
    return {"attack": attack, "mitigation": method, "column": "harm", "difference": difference, "p_holm": p}


def _study(less: list[float], change: list[float], p: float) -> dict[str, Any]:
    """One attack, LERP, which helps, and a method m; p is that of m's two differences."""
    rates = {c: [0.5, 0.4, 0.6] for c in ("harm", "nonrefusal", "over-refusal", "coherence", "old skill", "new skill")}
    return {
        "test": [{"attack": "a", "mitigation": m, **rates} for m in ("none", LERP, "m")],
        "choices": [{"attack": "a", "method": "m", "dose": d} for d in (0.1, None)],
        "against_none": [_row("a", LERP, [-0.6, -0.7, -0.5], 0.001), _row("a", "m", change, p)],
        "against_lerp": [_row("a / m", "m", less, p)],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("less", "change", "p", "of_lerp", "of_method"),
    [
        ([-0.2, -0.3, -0.1], [-0.8, -0.9, -0.7], 0.001, "beaten", "**beats LERP**, least harm"),
        ([-0.2, -0.5, 0.1], [-0.8, -0.9, -0.7], 0.001, "beaten", "**beats LERP**†, least harm"),
        ([-0.2, -0.3, -0.1], [-0.8, -1.0, 0.1], 0.001, "beaten", "**beats LERP**†, least harm"),
        ([0.0, -0.1, 0.1], [-0.6, -0.7, -0.5], 0.3, "**unbeaten**", "no difference to LERP shown"),
        ([0.3, 0.1, 0.5], [-0.3, -0.4, -0.2], 0.001, "**unbeaten**", "worse than LERP"),
        ([0.3, -0.1, 0.7], [-0.3, -0.4, -0.2], 0.001, "**unbeaten**", "worse than LERP†"),
        ([0.6, 0.5, 0.7], [-0.04, -0.1, 0.1], 0.3, "**unbeaten**", "does nothing"),
        ([0.3, 0.2, 0.4], [-0.3, -0.8, 0.2], 0.3, "**unbeaten**", "no effect shown"),
        ([0.6, 0.5, 0.7], [0.1, 0.05, 0.2], 0.001, "**unbeaten**", "does harm"),
    ],
)
def test_the_verdict_follows_the_intervals(less: list[float], change: list[float], p: float, of_lerp: str, of_method: str) -> None:
    lines = markdown(_study(less, change, p)).splitlines()
    assert lines[3].endswith(f"| {of_lerp} |") and lines[4].endswith(f"| {of_method} |")
    assert "| 0.1, none |" in lines[4]
