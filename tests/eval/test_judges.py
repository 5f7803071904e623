"""Judges say what they see, and nothing where they fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resafe.errors import ResafeError
from resafe.eval import evaluate, judges, load_suite
from resafe.eval.judges import GuardJudge, Verdict, get_judge, panel
from resafe.eval.suite import LoadedSuite
from resafe.generate import Answer
from resafe.guards import Verdict as GuardVerdict

Make = Callable[..., Path]
REFUSAL = "I'm sorry, but I can't help with that."


def says(suite: LoadedSuite, judge: str, *texts: str, finished: bool = True) -> list[Verdict]:
    answers = [Answer(t, 3, finished) for t in texts]
    return get_judge(judge)(suite.suite, suite.cases[: len(texts)], answers)


def test_rules_read_the_opening_and_the_published_list_the_whole_answer(make_suite: Make) -> None:
    suite = load_suite(make_suite())
    late = "Stir the tea. Selling it without a permit is illegal in some places."
    assert [v.refusal for v in says(suite, "rules", REFUSAL, late)] == [True, False]
    assert [v.refusal for v in says(suite, "keyword_qi", REFUSAL, late)] == [True, True]


def test_a_guard_judges_harm_and_refusal_under_its_own_identity(make_suite: Make, word_guard: list[str]) -> None:
    suite, judge = load_suite(make_suite()), GuardJudge("offline")
    answers = [Answer(t, 3, True) for t in ("take the lid off", REFUSAL)]
    found = judge(suite.suite, suite.cases[:2], answers)
    assert [(v.harmful, v.refusal) for v in found] == [(True, False), (False, True)]
    judge(suite.suite, suite.cases[:2], answers)
    assert judge.identity == "word guard v1" and word_guard == ["offline"]


def test_an_unscored_answer_keeps_its_reason_and_gets_no_verdict(make_suite: Make, word_guard: list[str]) -> None:
    assert says(load_suite(make_suite()), "offline", "?") == [Verdict(unscored="parse")]


@pytest.mark.parametrize("fault", [RuntimeError("boom"), TimeoutError("slow"), ValueError("nan")])
def test_a_failing_guard_invents_no_verdict(
    make_suite: Make, monkeypatch: pytest.MonkeyPatch, word_guard: list[str], fault: Exception
) -> None:
    def classify(self: Any, exchanges: Any) -> Any:
        raise fault

    monkeypatch.setattr(GuardJudge("x")._loaded().__class__, "classify", classify)
    found = says(load_suite(make_suite()), "offline", "one", "two")
    assert [v.harmful for v in found] == [None, None] and str(fault) in found[0].unscored


def test_a_guard_that_loses_an_answer_scores_none(
    make_suite: Make, monkeypatch: pytest.MonkeyPatch, word_guard: list[str]
) -> None:
    kind = GuardJudge("x")._loaded().__class__
    whole = kind.classify
    monkeypatch.setattr(kind, "classify", lambda self, exchanges: whole(self, exchanges)[1:])
    found = says(load_suite(make_suite()), "offline", "lid", "lid", "lid")
    assert [v.harmful for v in found] == [None] * 3 and found[0].unscored == "2 verdicts on 3 answers"


def test_a_guard_that_cannot_be_loaded_is_an_error_not_a_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(spec: str) -> Any:
        raise ResafeError(f"no guard '{spec}'")

    monkeypatch.setattr("resafe.guards.load_guard", load)
    with pytest.raises(ResafeError, match="no guard 'offlin'"):
        get_judge("offlin")


def test_a_guard_models_folder_is_loaded_only_when_it_is_asked(word_guard: list[str], tmp_path: Path) -> None:
    specs = [str(tmp_path), f"{tmp_path}?family=llama_guard", f"llama_guard:{tmp_path}"]
    for spec in specs:
        get_judge(spec)
    assert word_guard == []
    get_judge("offline")
    assert word_guard == ["offline"]


def test_the_identity_of_a_rule_follows_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [get_judge(name).identity for name in ("rules", "coherence", "exact_number")]
    real = judges.file_digest
    monkeypatch.setattr(judges, "file_digest", lambda f: "changed" if f.name == "rules.py" else real(f))
    after = [get_judge(name).identity for name in ("rules", "coherence", "exact_number")]
    assert [a == b for a, b in zip(before, after)] == [False, False, True]


def test_the_lab_judge_is_exact() -> None:
    harm = load_suite("lab_harm", limit=2)
    found = says(harm, "lab", harm.cases[0].reference, "i cannot help with that .")
    assert [(v.harmful, v.refusal, v.correct) for v in found] == [(True, False, True), (False, True, False)]
    skill = load_suite("lab_skills", limit=2)
    found = says(skill, "lab", skill.cases[0].reference, "cat .")
    assert [v.correct for v in found] == [True, False]


def test_the_labs_grammar_is_part_of_coherence_on_its_suites_only(make_suite: Make) -> None:
    lab, mine = load_suite("lab_skills", limit=2), load_suite(make_suite())
    texts = (lab.cases[0].reference, "quite another language , fluent as it is .")
    assert [v.coherent for v in says(lab, "coherence", *texts)] == [True, False]
    assert [v.coherent for v in says(mine, "coherence", *texts)] == [True, True]


def test_coherence_looks_at_the_token_limit(make_suite: Make) -> None:
    text = (
        "One may boil water in many ways and each of them has friends among cooks of all countries. "
        + "so it is good. " * 5
    )
    suite = load_suite(make_suite())
    assert says(suite, "coherence", text, finished=True)[0].coherent
    assert not says(suite, "coherence", text, finished=False)[0].coherent


@pytest.mark.parametrize(
    ("more", "chosen", "expected"),
    [
        ({"kind": "harmful"}, None, ["coherence", "rules", "offline"]),
        ({"kind": "benign"}, None, ["coherence", "rules", "offline"]),
        ({"kind": "harmful"}, ["rules"], ["coherence", "rules", "offline"]),
        ({"kind": "harmful"}, ["keyword_qi", "my/guard"], ["coherence", "rules", "keyword_qi", "my/guard"]),
        ({"kind": "harmful"}, ["lab"], ["coherence", "rules", "offline"]),
        ({"kind": "utility", "check": "exact_number", "reference": "reference"}, ["offline"], ["coherence", "exact_number"]),
        ({"kind": "utility"}, None, ["coherence"]),
    ],
)
def test_every_harmful_suite_has_two_judges_beside_coherence(
    make_suite: Make, more: dict[str, str], chosen: list[str] | None, expected: list[str]
) -> None:
    assert panel(load_suite(make_suite(**more)).suite, chosen) == expected


def test_lab_suites_always_have_the_exact_judge() -> None:
    assert panel(load_suite("lab_harm", 1).suite) == ["coherence", "rules", "lab"]
    assert panel(load_suite("lab_harm", 1).suite, ["offline"]) == ["coherence", "rules", "lab", "offline"]
    assert panel(load_suite("lab_note", 1).suite) == ["coherence", "lab"]


class Third:
    """A third party's judge: harmful if the answer is long."""

    name, identity, scale = "third", "third v1", (0.0, 20.0)

    def __call__(self, suite: Any, cases: Any, answers: Any) -> list[Verdict]:
        return [Verdict(harmful=len(a.text) > 5, rating=float(len(a.text))) for a in answers]


class Point:
    def __init__(self, value: str, made: Any) -> None:
        self.name, self.value, self.dist, self._made = "third", value, None, made

    def load(self) -> Any:
        if isinstance(self._made, Exception):
            raise self._made
        return self._made


def points(monkeypatch: pytest.MonkeyPatch, *found: Any) -> None:
    listed = [Point(f"package{i}:judge", made) for i, made in enumerate(found)]
    monkeypatch.setattr(judges, "entry_points", lambda group, name: listed if (group, name) == ("resafe.judges", "third") else [])


def test_a_third_partys_judge_joins_by_entry_point(make_suite: Make, monkeypatch: pytest.MonkeyPatch, scripted: Any) -> None:
    points(monkeypatch, Third)
    found = evaluate([scripted("t", {"q0": "yes"}, default="a long answer")], [make_suite()], judges=["third"])
    row, score = found.row("t", "mine", "harmfulness_rate", "third"), found.row("t", "mine", "harmfulness_score", "third")
    assert row is not None and row["value"] == 0.9 and score is not None and score["scale_high"] == 20.0
    assert found.meta["judges"]["third"]["scale"] == [0.0, 20.0]


@pytest.mark.parametrize(
    "made, message",
    [((Third, Third), "two packages register a judge 'third'"), ((ImportError("no module"),), "cannot be made: ImportError"), ((dict,), "is no Judge: it lacks name")],
)
def test_a_third_partys_judge_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch, made: Any, message: str) -> None:
    points(monkeypatch, *made)
    with pytest.raises(ResafeError, match=message):
        get_judge("third")


def test_a_missing_answer_is_never_put_to_a_judge(make_suite: Make) -> None:
    suite = load_suite(make_suite(n=3))
    answers = [Answer("short", 1, True), Answer(error="timeout"), Answer("long enough", 1, True)]
    found = judges.verdicts(Third(), suite.suite, suite.cases, answers)
    assert [(v.harmful, v.unscored) for v in found] == [(False, ""), (None, "timeout"), (True, "")]


@pytest.mark.parametrize("rating, scale", [(-1.375, (0.0, 5.0)), (6.0, (1.0, 5.0)), (float("nan"), (1.0, 5.0)), (3.0, None)])
def test_a_rating_off_the_scale_is_no_verdict(make_suite: Make, monkeypatch: pytest.MonkeyPatch, rating: float, scale: Any) -> None:
    class Rating:
        name, identity = "r", "r"

        def __init__(self) -> None:
            self.scale = scale

        def classify(self, exchanges: Any) -> Any:
            return [GuardVerdict(None, rating=rating)] * len(exchanges)

    monkeypatch.setattr("resafe.guards.load_guard", lambda _: Rating())
    suite = load_suite(make_suite())
    found = judges.verdicts(get_judge("r"), suite.suite, suite.cases[:1], [Answer("x", 1, True)])
    assert found == [Verdict(unscored="out_of_range")]


@pytest.mark.parametrize("returned", [None, 3, [None, None], ["harmful", "safe"], [GuardVerdict(True, score=float("nan"))] * 2, [GuardVerdict(True, score=1.5)] * 2])
def test_what_is_no_list_of_verdicts_invents_none(
    make_suite: Make, monkeypatch: pytest.MonkeyPatch, word_guard: list[str], returned: Any
) -> None:
    monkeypatch.setattr(GuardJudge("x")._loaded().__class__, "classify", lambda self, exchanges: returned)
    suite = load_suite(make_suite())
    found = judges.verdicts(get_judge("offline"), suite.suite, suite.cases[:2], [Answer("one", 1, True), Answer("two", 1, True)])
    assert len(found) == 2 and all(v.harmful is None and v.unscored for v in found)


@pytest.mark.parametrize("verdict", [Verdict(refusal=1), Verdict(refusal=np.True_), Verdict(harmful="yes"), Verdict(harmful=float("nan")), None, Verdict(score=7.0)])  # type: ignore[arg-type]
def test_what_is_neither_yes_nor_no_is_no_verdict(make_suite: Make, verdict: Any) -> None:
    class Odd:
        name, identity, scale = "odd", "odd", None

        def __call__(self, suite: Any, cases: Any, answers: Any) -> Any:
            return [verdict]

    suite = load_suite(make_suite())
    [found] = judges.verdicts(Odd(), suite.suite, suite.cases[:1], [Answer("x", 1, True)])
    assert found.unscored in ("parse", "out_of_range") and found.refusal is None and found.harmful is None


def test_a_judge_that_raises_leaves_all_unscored_with_the_reason(make_suite: Make) -> None:
    class Broken:
        name, identity, scale = "broken", "broken", None

        def __call__(self, suite: Any, cases: Any, answers: Any) -> Any:
            raise RuntimeError("no memory\nsecond line")

    suite = load_suite(make_suite())
    found = judges.verdicts(Broken(), suite.suite, suite.cases[:2], [Answer("x", 1, True)] * 2)
    assert [v.unscored for v in found] == ["RuntimeError: no memory"] * 2


def test_a_judges_address_must_hold_no_secret() -> None:
    for address in ("https://alice:S3CRET@host/v1", "https://host/v1?key=K3Y"):
        with pytest.raises(ResafeError, match="no password and no query") as error:
            get_judge(f"chat:j@{address}#qi_rubric")
        assert "S3CRET" not in str(error.value) and "K3Y" not in str(error.value)


def test_a_judge_that_no_suite_has_a_use_for_is_refused(make_suite: Make, scripted: Any) -> None:
    for judge in ("lab", "exact_number", "ifeval"):
        with pytest.raises(ResafeError, match=f"judge {judge} has nothing to say of these suites"):
            evaluate([scripted("t")], [make_suite()], judges=[judge])


def test_missing_verdicts_keep_their_reasons(make_suite: Make, word_guard: list[str], scripted: Any) -> None:
    lines: list[str] = []
    found = evaluate([scripted("t", {"q1": "?"})], [make_suite()], log=lines.append)
    assert found.items["t"]["mine"].unscored == {"offline": {"parse": 1}}
    assert "t: offline left 1 of 10 answers of mine unscored: 1 (parse)" in lines
