import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from resafe.errors import ResafeError
from resafe.guards import encoder as e
from resafe.guards import load_guard
from resafe.guards.linear import LinearGuard

QUESTION = [{"role": "user", "content": "How do I boil an egg?"}]
ANSWER = "Put the egg into boiling water. Take it out after six minutes. Cool it under the tap."


@pytest.fixture(scope="module")
def guard() -> e.EncoderGuard:
    found = load_guard("encoder")
    assert isinstance(found, e.EncoderGuard)
    return found


def test_both_heads_tell_an_answer_from_a_refusal(guard: e.EncoderGuard) -> None:
    refused, answered, empty = guard.classify([(QUESTION, "I'm sorry, but I can't help with that."), (QUESTION, ANSWER), (QUESTION, " \n")])
    assert (refused.refusal, refused.harmful) == (True, False)
    assert (answered.refusal, answered.harmful) == (False, False)
    assert (empty.refusal, empty.harmful, empty.unscored) == (None, None, "empty")
    assert guard.classify([]) == []


def test_verdicts_do_not_depend_on_the_batch(guard: e.EncoderGuard) -> None:
    exchanges = [(QUESTION, ANSWER), ([], "I won't do that."), (QUESTION, ANSWER * 20)]
    together = guard.classify(exchanges)
    alone = [guard.classify([x])[0] for x in exchanges]
    assert [v.refusal for v in together] == [v.refusal for v in alone]
    assert [v.score for v in together] == pytest.approx([v.score for v in alone], abs=1e-4)


def test_the_direction_of_the_prompt_is_taken_out_of_every_sentence(guard: e.EncoderGuard) -> None:
    prompt = guard.encoder.embed([QUESTION[0]["content"]])[QUESTION[0]["content"]]
    blocks = guard.encoder.features([(QUESTION, ANSWER)]).reshape(4, -1)
    assert np.abs(blocks @ prompt).max() < 1e-5
    assert np.linalg.norm(blocks[:3], axis=1) == pytest.approx(1, abs=1e-4)
    assert blocks[3] == pytest.approx(blocks[:3].mean(axis=0), abs=1e-5)
    assert np.abs(guard.encoder.features([([], ANSWER)]).reshape(4, -1) @ prompt).max() > 0.1


def test_the_score_is_a_quarter_the_embeddings_and_three_quarters_the_offline_judge(guard: e.EncoderGuard) -> None:
    exchange = (QUESTION, ANSWER)
    own = guard.encoder.features([([], ANSWER)])[0] @ guard.weights["harm"].astype(float) + guard.intercepts["harm"]
    expected = 1 / (1 + np.exp(-(0.25 * own + 0.75 * guard.offline.log_odds("harm", [exchange])[0])))
    assert guard.classify([exchange])[0].score == pytest.approx(expected, abs=1e-9)


def test_harm_is_judged_by_the_response_alone_and_refusal_beside_the_prompt(guard: e.EncoderGuard) -> None:
    asked, alone = guard.log_odds([(QUESTION, ANSWER)]), guard.log_odds([([], ANSWER)])
    assert asked["harm"] == pytest.approx(alone["harm"], abs=1e-6)
    assert abs(asked["refusal"] - alone["refusal"]).max() > 0.01


def test_the_identity_changes_with_the_head_and_with_the_offline_judge(guard: e.EncoderGuard) -> None:
    other_head = replace(guard, intercepts={**guard.intercepts, "harm": 0.0})
    other_judge = replace(guard, offline=replace(guard.offline, intercepts={**guard.offline.intercepts, "harm": 0.0}))
    other_threshold = replace(guard, threshold=0.9)
    assert len({guard.identity, other_head.identity, other_judge.identity, other_threshold.identity}) == 4


def test_an_answer_is_read_at_both_ends() -> None:
    found = e.sentences(" ".join(f"Sentence number {i}." for i in range(20)))
    assert found == [f"Sentence number {i}." for i in (0, 1, 2, 3, 4, 18, 19)]
    assert e.sentences("word " * 90) == [" ".join(["word"] * e.WORDS)]
    assert e.sentences("!?") == ["!?"]


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """The encoder with one weight changed."""
    folder = tmp_path / "mini"
    shutil.copytree(e.find_encoder(), folder)
    tensors = load_file(folder / "model.safetensors")
    name = min(tensors)
    tensors[name] = tensors[name] + np.ones_like(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_another_encoder_is_refused_with_the_way_to_fit_a_head(changed: Path) -> None:
    with pytest.raises(ResafeError, match=f"fit a head for them: python benchmarks/fit_offline_guard.py .*{changed}"):
        load_guard(f"encoder:{changed}")


def test_a_head_beside_the_encoder_is_taken(changed: Path, guard: e.EncoderGuard) -> None:
    own = e.Encoder(changed)
    weights = {h: np.zeros_like(w) for h, w in guard.weights.items()}
    (changed / e.OWN).write_bytes(e.head_bytes(own, weights, {"harm": 9.0, "refusal": -9.0}, 0.7))
    loaded = load_guard(f"encoder:{changed}")
    assert isinstance(loaded, e.EncoderGuard)
    assert (loaded.intercepts, loaded.threshold) == ({"harm": 9.0, "refusal": -9.0}, 0.7)
    assert loaded.identity != guard.identity


def test_a_folder_with_modules_that_may_hold_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}, {"path": "2", "type": "sentence_transformers.models.Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ResafeError, match="no modules but Normalize, Pooling, Transformer"):
        e.Encoder(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "", "type": "sentence_transformers.models.Transformer"}]))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ResafeError, match="needs model.safetensors"):
        e.Encoder(tmp_path)


def test_the_encoder_is_found_by_the_environment_or_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESAFE_ENCODER", "/some/folder")
    assert e.find_encoder() == Path("/some/folder")
    monkeypatch.delenv("RESAFE_ENCODER")
    assert (e.find_encoder() / "model.safetensors").is_file()
    monkeypatch.setattr(e, "PACKAGE", "no_such_package_here")
    with pytest.raises(ResafeError, match="name a sentence-transformers folder as encoder:FOLDER or in RESAFE_ENCODER"):
        e.find_encoder()


@pytest.mark.parametrize("content", [b"", b"not a head", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_foreign_head_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / e.OWN).write_bytes(content)
    with pytest.raises(ResafeError, match="not an encoder head"):
        e.EncoderGuard.load(tmp_path, LinearGuard({}, {}, 8))


def test_what_ships_is_below_two_megabytes() -> None:
    assert sum(f.stat().st_size for f in e.HEAD.parent.glob("*.safetensors")) <= 2 << 20
