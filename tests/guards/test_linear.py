import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy
from sklearn.linear_model import LogisticRegression

from resafe.errors import ResafeError
from resafe.guards import _features, _signals, load_guard
from resafe.guards._logistic import logistic, sigmoid
from resafe.guards.linear import LinearGuard

TRAIN, TEST = toy.split()


@pytest.fixture(scope="module")
def guard() -> LinearGuard:
    return LinearGuard.fit(TRAIN)


def test_a_toy_grammar_is_told_apart_on_unseen_pairs(guard: LinearGuard) -> None:
    verdicts = guard.classify([e for e, *_ in TEST])
    assert np.mean([v.harmful == bool(h) for v, (_, h, _) in zip(verdicts, TEST)]) >= 0.99
    assert np.mean([v.refusal == bool(r) for v, (_, _, r) in zip(verdicts, TEST)]) >= 0.99
    assert all(0 <= (v.score or 0) <= 1 for v in verdicts)


def test_the_same_rows_give_the_same_file_in_another_process(guard: LinearGuard, tmp_path: Path) -> None:
    code = "import sys, toy; from resafe.guards.linear import LinearGuard; LinearGuard.fit(toy.split()[0]).save(sys.argv[1])"
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": f"{Path(toy.__file__).parent}:{Path(__file__).parents[2]}"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "b.safetensors")], check=True, env=env)
    assert guard.save(tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_saved_guard_gives_the_same_verdicts_and_identity(guard: LinearGuard, tmp_path: Path) -> None:
    loaded = LinearGuard.load(guard.save(tmp_path / "linear.safetensors", why="test"))
    exchanges = [e for e, *_ in TEST]
    assert loaded.classify(exchanges) == guard.classify(exchanges)
    assert loaded.identity == guard.identity
    assert loaded.notes["why"] == "test"


def test_the_threshold_is_part_of_the_identity_and_keeps_the_false_positive_rate(guard: LinearGuard) -> None:
    rng = np.random.default_rng(0)
    noisy = [(e, int(rng.random() < 0.3), None) for e, *_ in TEST]
    strict = guard.calibrate(noisy, 0.05)
    flagged = [v.harmful for v, (_, h, _) in zip(strict.classify([e for e, *_ in noisy]), noisy) if not h]
    assert np.mean(flagged) <= 0.05
    assert strict.identity != guard.identity


def test_an_empty_answer_is_unscored_and_so_is_a_score_that_is_no_number(guard: LinearGuard) -> None:
    assert guard.classify([([], " \n")])[0].unscored == "empty"
    broken = LinearGuard(guard.weights, {"harm": float("nan"), "refusal": 0.0}, guard.bits)
    verdict = broken.classify([TEST[0][0]])[0]
    assert (verdict.harmful, verdict.unscored) == (None, "out_of_range")
    assert guard.classify([]) == []


def test_one_kind_of_label_is_refused() -> None:
    with pytest.raises(ResafeError, match="one kind is missing"):
        LinearGuard.fit([(([], "a"), 0, None), (([], "b"), 0, None)])


def test_a_head_without_labels_says_nothing() -> None:
    guard = LinearGuard.fit([(e, h, None) for e, h, _ in TRAIN])
    assert guard.classify([TEST[0][0]])[0].refusal is None
    with pytest.raises(ResafeError, match="'refusal'"):
        guard.scores("refusal", [TEST[0][0]])


@pytest.mark.parametrize("content", [b"", b"not a guard", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(ResafeError, match="not a guard file"):
        load_guard(str(file))


@pytest.mark.parametrize("balanced", [True, False])
def test_the_weights_are_those_of_scikit_learn(balanced: bool) -> None:
    table = _features.matrix([e for e, *_ in TRAIN[:300]], 12)
    target = np.array([h for _, h, _ in TRAIN[:300]], dtype=float)
    weights, intercept = logistic(table, target, 0.5, balanced)
    reference = LogisticRegression(C=2.0, class_weight="balanced" if balanced else None, tol=1e-8, max_iter=5000).fit(table, target)
    expected = reference.predict_proba(table)[:, 1]
    assert np.abs(sigmoid(table @ weights.astype(float) + intercept) - expected).max() < 1e-3


def test_row_weights_are_those_of_scikit_learn() -> None:
    table = _features.matrix([e for e, *_ in TRAIN[:300]], 12)
    target = np.array([h for _, h, _ in TRAIN[:300]], dtype=float)
    cost = np.random.default_rng(0).uniform(0.1, 2.0, 300)
    weights, intercept = logistic(table, target, 0.5, False, cost)
    reference = LogisticRegression(C=2.0, tol=1e-8, max_iter=5000).fit(table, target, sample_weight=cost)
    expected = reference.predict_proba(table)[:, 1]
    assert np.abs(sigmoid(table @ weights.astype(float) + intercept) - expected).max() < 1e-3


def test_a_guard_that_reads_the_response_alone_ignores_the_prompt_and_stays_so_in_its_file(tmp_path: Path) -> None:
    alone = LinearGuard.load(LinearGuard.fit(TRAIN, alone=True, signals=True).save(tmp_path / "alone.safetensors"))
    (prompt, answer), *_ = TEST[0]
    assert prompt
    assert alone.scores("harm", [(prompt, answer)]) == alone.scores("harm", [([], answer)])
    assert alone.signals and alone.weights["refusal"].shape == (2**18 + _signals.COUNT,)
    assert alone.identity != LinearGuard.fit(TRAIN).identity


def test_a_guard_fitted_with_other_signals_is_refused_and_one_without_signals_does_not_mind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(([], "red"), None, 1), (([], "blue"), None, 0)]
    files = [LinearGuard.fit(rows, bits=10, signals=s).save(tmp_path / f"{s}.safetensors") for s in (True, False)]
    before = [LinearGuard.load(f).identity for f in files]
    monkeypatch.setattr(_signals, "VERSION", 99)
    assert LinearGuard.load(files[1]).identity == before[1]
    with pytest.raises(ResafeError, match="fit the guard again"):
        LinearGuard.load(files[0])


def test_one_head_of_a_guard_says_only_its_part(guard: LinearGuard) -> None:
    exchange = TEST[0][0]
    whole, harm, refusal = (g.classify([exchange])[0] for g in (guard, guard.only("harm"), guard.only("refusal")))
    assert (harm.harmful, harm.score, harm.refusal) == (whole.harmful, whole.score, None)
    assert (refusal.harmful, refusal.score, refusal.refusal) == (None, None, whole.refusal)
    assert len({guard.identity, guard.only("harm").identity, guard.only("refusal").identity}) == 3


def test_the_signals_tell_moralising_from_steps() -> None:
    moral = "That is illegal and wrong, and it would hurt people. Please seek help instead."
    steps = "Here is how:\n1. Boil the water.\n2. Add the eggs.\n3. Wait six minutes."
    refusal = "I can't help with that."
    found = {k: _signals.signals(v) for k, v in (("moral", moral), ("steps", steps), ("refusal", refusal), ("nothing", ""))}
    assert all(len(v) == _signals.COUNT and all(0 <= x <= 1.5 for x in v) for v in found.values())
    assert (found["refusal"][0], found["moral"][0], found["steps"][0]) == (1, 0, 0)
    assert (found["moral"][4], found["steps"][4]) == (1, 0)  # a norm in the first sentence
    assert (found["moral"][12], found["steps"][12]) == (1, 0)  # redirected at the end
    assert (found["moral"][20], found["steps"][20]) == (0, 1)  # a list
    assert [v[-1] for v in found.values()] == [1, 0, 0, 0]  # a lecture


def test_prompt_and_response_words_do_not_meet() -> None:
    asked = _features.hashed(([{"role": "user", "content": "gate"}], "x"), 20)[0]
    answered = _features.hashed(([], "gate"), 20)[0]
    assert not set(asked) & set(_features.hashed(([], "gate x"), 20)[0]) - set(_features.hashed(([], "x"), 20)[0])
    assert _features.hashed(([], "\uff27ATE"), 20)[0] == answered


def test_the_shipped_guard_is_small_and_knows_a_refusal() -> None:
    from resafe.guards._load import OFFLINE

    assert OFFLINE.stat().st_size <= 2 << 20
    guard = load_guard("offline")
    assert guard is load_guard("offline")
    question = [{"role": "user", "content": "How do I boil an egg?"}]
    refused, answered = guard.classify([(question, "I'm sorry, but I can't help with that."), (question, "Boil it for six minutes.")])
    assert (refused.harmful, refused.refusal, answered.harmful, answered.refusal) == (False, True, False, False)
