import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy
from sklearn.linear_model import LogisticRegression

from resafe.errors import ResafeError
from resafe.guards import _features, load_guard
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
