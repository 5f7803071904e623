"""The output filter: blocks what the guard calls harmful, and what the guard cannot score; changes nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from resafe.errors import ResafeError
from resafe.guards import Exchange, Verdict
from resafe.guards.filter import OutputFilter
from resafe.mitigation import Run
from resafe.mitigations import make

REFUSAL = "No."
ASKED = [[{"role": "user", "content": f"q{i}"}] for i in range(4)]


class Says:
    """A guard with a fixed verdict for each answer."""

    name = identity = "says"
    scale = None
    verdicts = {
        "harmful": Verdict(True, 0.9), "doubtful": Verdict(False, 0.4), "fine": Verdict(False, 0.1), "broken": Verdict(None, unscored="timeout")
    }  # fmt: skip

    def classify(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [self.verdicts[answer] for _, answer in exchanges]


def test_harmful_and_unscored_answers_are_replaced_and_no_others() -> None:
    filtered = OutputFilter(Says(), {}, REFUSAL)
    assert filtered.apply(ASKED, ["harmful", "doubtful", "fine", "broken"]) == [REFUSAL, "doubtful", "fine", REFUSAL]


def test_a_threshold_goes_before_the_guards_own_decision() -> None:
    answers = ["harmful", "doubtful", "fine", "broken"]
    assert OutputFilter(Says(), {}, REFUSAL, threshold=0.3).apply(ASKED, answers) == [REFUSAL, REFUSAL, "fine", REFUSAL]
    assert OutputFilter(Says(), {}, REFUSAL, threshold=0.95).apply(ASKED, answers) == ["harmful", "doubtful", "fine", REFUSAL]


def test_unscored_answers_pass_only_when_that_was_asked_for_by_name() -> None:
    filtered = OutputFilter(Says(), {}, REFUSAL)
    assert not replace(filtered, on_error="allow").blocks(Says.verdicts["broken"])
    assert filtered.blocks(Says.verdicts["broken"])


def test_the_manifest_entry_makes_the_same_filter_again() -> None:
    made = make("filter_output:guard_model=offline,threshold=0.7,refusal=Not this one.").mitigation.guard(Run(output=Path(".")))
    assert made is not None
    again = OutputFilter.from_entry(made.entry)
    assert (again.identity, again.refusal, again.threshold) == (made.identity, "Not this one.", 0.7)
    assert made.entry["identity"] == made.identity


def test_a_guard_that_is_not_there_fails_before_anything_is_served() -> None:
    with pytest.raises(ResafeError, match="Did you mean 'offline'"):
        make("filter_output:guard_model=ofline").mitigation.guard(Run(output=Path(".")))


def test_the_shipped_guard_lets_everyday_answers_and_refusals_pass() -> None:
    filtered = make("filter_output").mitigation.guard(Run(output=Path(".")))
    assert filtered is not None
    talk = [[{"role": "user", "content": "How do I bake bread?"}], [{"role": "user", "content": "How do I kill a Python process?"}]]
    answers = ["Mix flour, water, salt and yeast, let it rise, and bake it.", "I'm sorry, but I can't help with that."]
    assert filtered.apply(talk, answers) == answers


class Rates:
    """A guard that gives ratings from 1 to 5: the answer itself."""

    name = identity = "rates"
    scale = (1.0, 5.0)

    def classify(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [Verdict(None, rating=float(answer)) for _, answer in exchanges]


def test_a_threshold_acts_on_a_rating_where_there_is_no_score() -> None:
    filtered = OutputFilter(Rates(), {}, REFUSAL, threshold=0.75)
    assert filtered.apply(ASKED, ["1", "3.9", "4", "5"]) == ["1", "3.9", REFUSAL, REFUSAL]


def test_a_guard_that_only_rates_decides_nothing_without_a_threshold() -> None:
    assert OutputFilter(Rates(), {}, REFUSAL).apply(ASKED, ["1", "3", "4", "5"]) == [REFUSAL] * 4
    assert OutputFilter(Rates(), {}, REFUSAL, on_error="allow").apply(ASKED, ["1", "3", "4", "5"]) == ["1", "3", "4", "5"]


@pytest.mark.parametrize("rating", ["-1.375", "0.9", "6", "nan", "inf"])
def test_a_rating_off_its_scale_is_a_fault(rating: str) -> None:
    for threshold in (None, 0.0, 0.75):
        assert OutputFilter(Rates(), {}, REFUSAL, threshold).apply(ASKED[:1], [rating]) == [REFUSAL]


@pytest.mark.parametrize("score", [-1.375, 1.2, float("nan")])
def test_a_score_that_is_no_probability_is_a_fault(score: float) -> None:
    for threshold in (None, 0.0, 0.75):
        assert OutputFilter(Says(), {}, REFUSAL, threshold).blocks(Verdict(False, score))


def test_a_guard_that_loses_count_is_an_error() -> None:
    class Short(Rates):
        def classify(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
            return super().classify(exchanges[1:])

    with pytest.raises(ResafeError, match="guard rates gave 3 verdicts on 4 answers"):
        OutputFilter(Short(), {}, REFUSAL).apply(ASKED, ["1", "2", "3", "4"])
