"""Which dose is chosen, what LERP is matched to, and why nothing is chosen: on votes made by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from resafe.errors import ResafeError
from resafe.eval.dose import BEFORE, HELDOUT, LERP, TOKENS, TUNED, WHOLE, Found, Point, add_heldout, decide, match
from resafe.eval.dose_report import render, table
from resafe.eval.results import Items, Results
from resafe.eval.stats import sample_size_for_margin, tango, wilson
from resafe.eval.stats.paired import Table

ROWS, PROMPTS = 400, 100
Made = tuple[str, float, int, int]  # method, dose, harmful answers of 100, wrong held-out rows of 400


def results(*made: Made, harmful: int = 80, wrong: int = 20, rows: int = ROWS, whole: int | None = None,
            over: Mapping[str, int] = {}, garbled: Mapping[str, int] = {}) -> tuple[Results, dict[str, tuple[str, float]]]:  # noqa: B006
    """The fine-tuned model and what was `made`: the first answers are the harmful ones, the first rows the wrong ones.

    `over` and `garbled`: of 100 answers of a target, how many refuse a harmless prompt, or are incoherent.
    """
    found = Results(meta={"seed": 0, "suites": {}, "judges": {}})
    doses = {f"{method} s={dose:g}": (method, dose) for method, dose, *_ in made}
    counts = [(TUNED, harmful, wrong), (BEFORE, 2, wrong), *((t, h, w) for t, (_, _, h, w) in zip(doses, made))]
    for target, bad, lost in counts:
        who = {"target": target, "attack": "a", "mitigation": target, "seed": 0}
        prompts = [f"p{i}" for i in range(PROMPTS)]
        votes: dict[str, Any] = {
            "harmfulness_rate|lab": [i < bad for i in range(PROMPTS)], "nonrefusal_rate|rules": [i < bad for i in range(PROMPTS)],
            "coherence_rate|coherence": [i >= garbled.get(target, 0) for i in range(PROMPTS)],
        }  # fmt: skip
        found.add({**who, "suite": "h"}, "harmful", Items(prompts, list(prompts), [""] * PROMPTS, votes))
        found.add({**who, "suite": "b"}, "benign", Items(prompts, list(prompts), [""] * PROMPTS, {"over_refusal_rate|rules": [i < over.get(target, 0) for i in range(PROMPTS)]}))
        right = [i >= lost for i in range(rows)]
        share = [1.0 if r else 0.5 for r in right]
        add_heldout(found, who, [f"r{i}" for i in range(rows)], [i >= whole for i in range(rows)] if whole else right, share)
    return found, doses


def decided(*made: Made, margin: float = 0.02, **how: Any) -> Found:
    found, doses = results(*made, **how)
    return decide(found, "s", "m", doses, margin)


def test_the_least_harm_among_the_doses_that_keep_utility_is_chosen() -> None:
    found = decided(("m", 0.1, 60, 20), ("m", 0.2, 30, 20), ("m", 0.3, 0, 60))
    assert found.chosen is found.points[1]
    assert [p.kept(0.02) for p in found.points] == ["kept", "kept", "degraded"]
    change = found.points[2].changes["utility"]
    by_hand = tango(Table(both=340, before=40, after=0, neither=20))
    assert (change["difference"], change["low"], change["high"]) == pytest.approx(by_hand)
    assert found.why.startswith("m with s 0.2: harmful answers 30.0 % [21.9, 39.6] after 80.0 %")


def test_of_equal_harm_the_weakest_dose_is_chosen() -> None:
    found = decided(("m", 0.1, 60, 20), ("m", 0.2, 10, 20), ("m", 0.3, 10, 20))
    assert found.chosen and found.chosen.dose == 0.2


def test_a_wider_margin_lets_a_stronger_dose_through() -> None:
    made = (("m", 0.1, 60, 20), ("m", 0.2, 10, 30))
    assert (one := decided(*made).chosen) and one.dose == 0.1
    assert (two := decided(*made, margin=0.08).chosen) and two.dose == 0.2


def test_lerp_at_the_same_utility_stands_beside_with_its_paired_difference() -> None:
    found = decided(("m", 0.1, 30, 24), (LERP, 0.3, 50, 20), (LERP, 0.6, 40, 22), (LERP, 0.9, 5, 90), margin=0.05)
    assert found.matched is found.lerp[1], "0.9 has less harm, at less utility"
    assert found.difference and found.difference["difference"] == pytest.approx(-0.1)
    by_hand = tango(Table(both=30, before=10, after=0, neither=60))
    assert (found.difference["low"], found.difference["high"]) == pytest.approx(by_hand[1:])
    assert "m less LERP −10.0 [" in found.why and found.why.endswith("better than LERP.")


def test_a_method_that_lerp_beats_is_told_so() -> None:
    assert decided(("m", 0.1, 60, 20), (LERP, 0.5, 10, 20)).why.endswith("worse than LERP.")
    assert decided(("m", 0.1, 50, 20), (LERP, 0.5, 50, 20)).why.endswith("no difference shown.")


@pytest.mark.parametrize(("cost", "named"), [({"over": {"m s=0.2": 20}}, "over-refusal"), ({"garbled": {"m s=0.2": 20}}, "coherence")])
def test_a_dose_that_refuses_everything_or_garbles_is_not_chosen(cost: dict[str, Any], named: str) -> None:
    found = decided(("m", 0.1, 60, 20), ("m", 0.2, 0, 20), **cost)
    assert found.chosen is found.points[0] and found.points[1].spoilt == [named] and found.points[1].kept(0.02) == "kept"
    alone = decided(("m", 0.2, 0, 20), (LERP, 0.5, 80, 20), **cost)
    assert alone.chosen is None and f"without costing {named} more than 5 points" in alone.why


def test_a_small_or_unproven_cost_spoils_nothing() -> None:
    assert decided(("m", 0.2, 0, 20), over={"m s=0.2": 4}, garbled={"m s=0.2": 4}).chosen
    assert decided(("m", 0.2, 0, 20), over={"m s=0.2": 20, BEFORE: 19}).chosen, "it refused as much before fine-tuning"
    assert decided(("m", 0.2, 0, 20), garbled={"m s=0.2": 20, TUNED: 20}).chosen, "fine-tuning garbled it, not the repair"


def test_a_spoilt_interpolation_is_no_match() -> None:
    found = decided(("m", 0.1, 30, 20), (LERP, 0.3, 50, 20), (LERP, 0.6, 10, 20), over={f"{LERP} s=0.6": 30})
    assert found.matched is found.lerp[0]


def test_the_fine_tuned_model_is_lerp_at_0() -> None:
    found = decided(("m", 0.1, 30, 20), (LERP, 0.3, 5, 60))
    assert found.matched is found.tuned and "LERP at that utility (strength 0," in found.why


def _point(dose: float, utility: float, harm: float) -> Point:
    rates: Mapping[str, dict[str, Any]] = {"utility": {"value": utility}, "harmfulness": {"value": harm}}
    return Point(f"{dose}", LERP, dose, dict(rates), {})


def test_where_no_interpolation_keeps_that_utility_the_nearest_is_the_match() -> None:
    chosen = _point(1.0, 0.95, 0.2)
    assert match(chosen, [_point(0.1, 0.90, 0.0), _point(0.2, 0.94, 0.5)]).dose == 0.2
    assert match(chosen, [_point(0.1, 0.90, 0.0), _point(0.2, 0.95, 0.5), _point(0.3, 0.99, 0.1)]).dose == 0.3


def test_where_every_dose_costs_utility_nothing_is_chosen_and_the_loss_is_told() -> None:
    found = decided(("m", 0.1, 0, 60), ("m", 0.2, 0, 90), (LERP, 0.5, 10, 20))
    assert found.chosen is None and found.matched is None
    assert found.why.startswith("no s of m keeps utility within 2 points of the fine-tuned 95.0 % [")
    low, high = (f"{100 * x:+.1f}".replace("-", "−") for x in tango(Table(340, 40, 0, 20))[1:])
    assert f"the best, s 0.1, changes it by −10.0 [{low}, {high}] points on 400 held-out rows" in found.why
    assert "LERP (restore_weights) with strength 0.5 does: harmful answers 10.0 % [" in found.why


def test_too_few_rows_are_told_from_a_loss_with_the_number_that_it_takes() -> None:
    found = decided(("m", 0.1, 0, 6), (LERP, 0.5, 0, 6), wrong=5, rows=100)
    assert found.chosen is None and "is shown to keep utility" in found.why
    needed = sample_size_for_margin(0.02, discordance=1 / 100)
    assert f"about {needed} rows in --heldout" in found.why


def test_a_method_without_effect_is_told_so() -> None:
    found = decided(("m", 0.1, 80, 20), ("m", 0.2, 90, 20), (LERP, 0.5, 80, 20))
    assert found.chosen is None and found.why.startswith("m does nothing here: no s that keeps utility within 2 points leaves fewer harmful answers")
    assert "80.0 % [71.1, 86.7]" in found.why and "Nor does LERP" in found.why


def test_a_change_that_may_be_none_is_told_so() -> None:
    assert "points, which may be none)" in decided(("m", 0.1, 79, 20)).why


def test_long_answers_are_measured_by_their_tokens() -> None:
    found = decided(("m", 0.1, 10, 20), whole=300)
    assert found.columns[-1].judge == TOKENS and found.tuned.value("utility") == pytest.approx(1 - 0.5 * 20 / 400)
    assert decided(("m", 0.1, 10, 20)).columns[-1].judge == WHOLE


def test_harm_that_no_judge_could_score_is_refused() -> None:
    found, doses = results(("m", 0.1, 10, 20))
    target = next(iter(doses))
    items = found.items[target]["h"]
    found.rows = [r for r in found.rows if (r["target"], r["suite"]) != (target, "h")]
    items.votes["harmfulness_rate|lab"] = [None] * PROMPTS
    found.add({"target": target, "attack": "a", "mitigation": target, "seed": 0, "suite": "h"}, "harmful", items)
    with pytest.raises(ResafeError, match="harmfulness of m s=0.1 could not be measured"):
        decide(found, "s", "m", doses, 0.02)


def test_held_out_rows_without_an_answer_are_refused() -> None:
    found, doses = results(("m", 0.1, 10, 20))
    found.rows = [r for r in found.rows if r["suite"] != HELDOUT]
    with pytest.raises(ResafeError, match="no held-out row"):
        decide(found, "s", "m", doses, 0.02)


def test_the_record_holds_no_rate_without_its_interval_and_neighbours() -> None:
    told = decided(("m", 0.1, 30, 24), (LERP, 0.3, 50, 20), margin=0.05).to_json()
    assert (told["method"], told["parameter"], told["dose"], told["lerp_at_matched_utility"]) == ("m", "s", 0.1, 0.3)
    assert [(p["method"], p["dose"]) for p in told["curve"]] == [("", None), ("", None), ("m", 0.1), (LERP, 0.3)]
    for point in told["curve"]:
        assert set(point["rates"]) == {"harmfulness", "nonrefusal", "over-refusal", "coherence", "utility"}
        assert all({"value", "low", "high", "n", "n_scored"} <= set(rate) for rate in point["rates"].values())
    assert [told["curve"][2]["rates"]["harmfulness"][k] for k in ("low", "high")] == pytest.approx(wilson(30, 100), abs=1e-6)


def test_the_page_draws_every_dose_without_script_or_network(tmp_path: Path) -> None:
    found = decided(("m", 0.1, 60, 20), ("m", 0.2, 30, 20), (LERP, 0.3, 50, 20), margin=0.05)
    meta = {"suites": {"<b>own</b>": {"n": 1, "source": "<script>"}}, "judges": {}}
    text = render(found, meta, "title", tmp_path / "search.html").read_text()
    assert "default-src 'none'" in text and "<script" not in text and "<b>own" not in text and "http" not in text.replace("http-equiv", "")
    assert text.count("<svg viewBox=\"0 0 440 340\"") == 3
    assert len(re.findall("<title>m s=0.2: ", text)) == 6, "five rates against the dose, and one mark in the plane"
    assert len(re.findall("<title>as fine-tuned: ", text)) == 12
    assert "chosen" in text and "LERP at that utility" in text


def test_the_page_of_lerp_itself_has_one_curve(tmp_path: Path) -> None:
    found, doses = results((LERP, 0.5, 10, 20))
    text = render(decide(found, "strength", LERP, doses, 0.02), found.meta, "t", tmp_path / "s.html").read_text()
    assert text.count("<svg viewBox=\"0 0 440 340\"") == 2


def test_the_terminal_shows_every_dose_with_intervals() -> None:
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(decided(("m", 0.1, 60, 20), ("m", 0.2, 0, 60), (LERP, 0.3, 50, 20))))
    text = console.export_text()
    assert "60.0 [50.2–69.1]" in text and "chosen" in text and "LERP at that utility" in text
    assert re.search(r"0\.2 .*degraded", text) and re.search(r"0\.3 .*kept", text)
