"""The sentence names a winner only where missing verdicts cannot change it."""

from __future__ import annotations

from resafe.eval import Results
from resafe.eval.results import Items
from resafe.recipes.tell import tell


def study(first: list[bool | None], second: list[bool | None]) -> Results:
    results = Results()
    for attack, mitigation, votes in (("none", "none", [False] * 20), ("x", "none", [True] * 20), ("x", "one", first), ("x", "two", second)):
        ids = [str(i) for i in range(20)]
        who = {"target": f"{attack} {mitigation}", "attack": attack, "mitigation": mitigation, "seed": None, "suite": "s"}
        results.add(who, "harmful", Items(ids, ids, [""] * 20, {"harmfulness_rate|g": list(votes)}))
    return results


def test_the_best_mitigation_is_named() -> None:
    said = tell(study([False] * 20, [True] * 5 + [False] * 15))
    assert "0.0 % [0.0, 16.1] with one" in said


def test_no_winner_is_named_where_missing_verdicts_decide() -> None:
    said = tell(study([False] * 15 + [None] * 5, [True] + [False] * 19))
    assert said.endswith("Missing verdicts leave open whether one or two is best: no winner is named.")


def test_missing_verdicts_that_cannot_decide_do_not_matter() -> None:
    assert "with one" in tell(study([False] * 18 + [None] * 2, [True] * 5 + [False] * 15))
