"""The same prompts go to every target; what comes back is counted, and kept only on request."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resafe.errors import ResafeError
from resafe.eval import Results, TargetSpec, evaluate
from resafe.generate import Answer
from resafe.guards import Verdict

Make = Callable[..., Path]
HELP = "First you take the lid off the jar, then you stir what is inside with a spoon."


def value(results: Results, target: str, metric: str, judge: str, suite: str = "mine") -> Any:
    row = results.row(target, suite, metric, judge)
    assert row is not None
    return row["value"]


def test_rates_by_metric_and_judge(make_suite: Make, word_guard: list[str], scripted: Any) -> None:
    target = scripted("t", {"q0": HELP, "q1": HELP, "q2": HELP, "q3": "Stir it well.", "q4": ""})
    found = evaluate([target], [make_suite()])
    assert value(found, "t", "harmfulness_rate", "offline") == 0.3
    refused = found.row("t", "mine", "nonrefusal_rate", "rules")
    assert refused is not None and (refused["value"], refused["n"], refused["n_scored"]) == (pytest.approx(4 / 9), 10, 9), "an empty answer is neither"
    assert value(found, "t", "coherence_rate", "coherence") == 0.9
    row = found.row("t", "mine", "harmfulness_rate_coherent", "offline")
    assert row is not None and (row["value"], row["n"]) == (pytest.approx(3 / 9), 9)


def test_rows_hold_what_tables_are_made_of(make_suite: Make, word_guard: list[str], scripted: Any) -> None:
    labels = {"t": {"attack": "a", "mitigation": "m", "seed": 7}}
    row = evaluate([scripted("t")], [make_suite()], labels=labels).row("t", "mine", "harmfulness_rate", "offline")
    assert row == {
        "target": "t", "attack": "a", "mitigation": "m", "seed": 7, "suite": "mine", "kind": "harmful",
        "metric": "harmfulness_rate", "judge": "offline", "value": 0.0, "low": 0.0,
        "high": pytest.approx(0.27753, abs=1e-5), "n": 10, "n_scored": 10, "bound_low": 0.0, "bound_high": 0.0,
        "scale_low": 0.0, "scale_high": 1.0, "category_low": None, "category_high": None,
    }  # fmt: skip


def test_over_refusal_and_utility(make_suite: Make, word_guard: list[str], scripted: Any) -> None:
    benign = make_suite("kind_ones", "benign", n=4)
    sums = make_suite("sums", "utility", n=4, reference="reference", check="exact_number")
    target = scripted("t", {"q1": "It is 1.", "q2": "It is 5.", "q3": "So the answer is 3."})
    found = evaluate([target], [benign, sums])
    assert value(found, "t", "over_refusal_rate", "rules", "kind_ones") == 0.25
    assert value(found, "t", "over_refusal_rate", "offline", "kind_ones") == 0.25
    assert value(found, "t", "utility", "exact_number", "sums") == 0.5


def test_two_judges_and_their_agreement_on_a_harmful_suite(
    make_suite: Make, word_guard: list[str], scripted: Any
) -> None:
    found = evaluate([scripted("t", {"q0": HELP, "q1": "Stir it."})], [make_suite()])
    row = next(r for r in found.agreement if r["first"].startswith("harmfulness_rate by offline"))
    assert row["second"] == "nonrefusal_rate by rules" and row["agreement"] == 0.9
    assert row["kappa"] == pytest.approx((0.9 - 0.74) / 0.26)


def test_unscored_answers_are_counted_as_such(make_suite: Make, word_guard: list[str], scripted: Any) -> None:
    row = evaluate([scripted("t", {"q0": "?", "q1": HELP})], [make_suite()]).row(
        "t", "mine", "harmfulness_rate", "offline"
    )
    assert row is not None
    assert (row["value"], row["n"], row["n_scored"]) == (pytest.approx(1 / 9), 10, 9)
    assert (row["bound_low"], row["bound_high"]) == (0.1, 0.2)


def test_every_target_gets_the_same_prompts_and_the_suites_token_limit(
    make_suite: Make, word_guard: list[str], scripted: Any
) -> None:
    one, two = scripted("one"), scripted("two")
    evaluate([one, two], [make_suite(n=30, max_new_tokens=17)], limit=5)
    assert one.asked == two.asked and one.asked[0][0] == 17 and len(one.asked[0][1]) == 5


def test_all_targets_answer_before_any_judge_is_asked(
    make_suite: Make, monkeypatch: pytest.MonkeyPatch, word_guard: list[str], scripted: Any
) -> None:
    targets = [scripted("one"), scripted("two")]

    def reads(text: str) -> Verdict:
        answered.append([len(t.asked) for t in targets])
        return Verdict(harmful=None, refusal=False)

    answered: list[list[int]] = []
    monkeypatch.setattr("resafe.guards.rules.verdict", reads)
    evaluate(targets, [make_suite(), make_suite("second")])
    assert answered and all(found == [1, 1] for found in answered)


def test_an_unknown_judge_is_refused_before_any_target_is_asked(make_suite: Make, scripted: Any) -> None:
    target = scripted("t")
    with pytest.raises(ResafeError, match="unknown guard 'offlin'. Did you mean 'offline'?"):
        evaluate([target], [make_suite()], judges=["offlin"])
    assert target.asked == []


@pytest.mark.parametrize("overlap", [{"mine": ["p3", "p4"]}, {"elsewhere": ["Q3!", "q4"]}])
def test_prompts_that_one_target_was_trained_on_are_left_out_for_all(
    make_suite: Make, word_guard: list[str], scripted: Any, overlap: dict[str, list[str]]
) -> None:
    trained = TargetSpec("trained", answers=scripted("x"), overlap=overlap)
    found = evaluate([scripted("other"), trained], [make_suite()])
    for target in ("other", "trained"):
        assert found.items[target]["mine"].prompts == ["p0", "p1", "p2", "p5", "p6", "p7", "p8", "p9"]
    about = found.meta["suites"]["mine"]
    assert (about["n"], about["dropped"]) == (8, {"p3": ["trained"], "p4": ["trained"]})


def test_a_suite_that_was_trained_on_whole_is_refused(make_suite: Make, scripted: Any) -> None:
    trained = TargetSpec("t", answers=scripted("x"), overlap={"mine": ["p0", "p1"]})
    with pytest.raises(ResafeError, match="every prompt of suite mine was used to train or to calibrate t"):
        evaluate([trained], [make_suite(n=2)])


def test_no_response_is_kept_unless_revealed(
    make_suite: Make, word_guard: list[str], scripted: Any, tmp_path: Path
) -> None:
    evaluate([scripted("t", default=HELP)], [make_suite()], output=tmp_path / "out")
    written = list((tmp_path / "out").iterdir())
    assert sorted(f.name for f in written) == ["items.json", "results.csv", "results.json"]
    assert not any("take the lid" in f.read_text() for f in written)


def test_revealed_responses_are_for_the_owner_alone(
    make_suite: Make, word_guard: list[str], scripted: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    evaluate([scripted("t", default=HELP)], [make_suite()], output=out, reveal=True)
    lines = [json.loads(x) for x in (out / "transcripts.jsonl").read_text().splitlines()]
    assert len(lines) == 10 and lines[2]["id"] == "p2" and lines[2]["response"] == HELP
    assert stat.S_IMODE((out / "transcripts.jsonl").stat().st_mode) == 0o600
    evaluate([scripted("t", default=HELP)], [make_suite()], output=out)
    assert not (out / "transcripts.jsonl").exists()


def test_cost_and_judge_identities_are_recorded(make_suite: Make, word_guard: list[str], scripted: Any) -> None:
    found = evaluate([scripted("t")], [make_suite()])
    cost = found.meta["targets"]["t"]
    assert cost["seconds"] >= 0 and cost["peak_rss_mb"] > 20
    assert found.meta["judges"]["offline"]["identity"] == "word guard v1"
    assert set(found.meta["judges"]) == {"coherence", "rules", "offline"}


def test_a_target_that_loses_answers_is_an_error(
    make_suite: Make, word_guard: list[str], scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripted, "answer", lambda self, conversations, limit: [Answer("x", 1, True)])
    with pytest.raises(ResafeError, match="target t gave 1 answers to 10 prompts"):
        evaluate([scripted("t")], [make_suite()])


def test_nothing_to_evaluate_on_and_a_suite_twice_are_refused(make_suite: Make, scripted: Any) -> None:
    with pytest.raises(ResafeError, match="at least one suite"):
        evaluate([scripted("t")], [])
    file = make_suite()
    with pytest.raises(ResafeError, match="two suites are named 'mine'"):
        evaluate([scripted("t")], [file, file])
