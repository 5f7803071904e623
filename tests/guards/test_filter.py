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
