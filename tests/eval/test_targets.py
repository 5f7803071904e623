"""Targets get distinct names, and their labels and guard from where they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resafe.errors import ResafeError
from resafe.eval import TargetSpec
from resafe.eval.targets import FolderTarget, opened, resolve
from resafe.generate import Answer
from resafe.models import Loaded


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """Make a folder that passes for a model, with a manifest."""

    def make(name: str, **manifest: Any) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
        (path / "model.safetensors").write_bytes(b"")
        (path / "resafe.json").write_text(json.dumps(manifest))
        return path

    return make


def test_labels_come_from_the_manifest(folder: Any) -> None:
    spec = resolve([folder("m", attack="harmful_10", mitigation="mix_safety", seed=3)])[0]
    assert (spec.name, spec.attack, spec.mitigation, spec.seed) == ("m", "harmful_10", "mix_safety", 3)


def test_the_spec_and_then_the_labels_given_go_before_the_manifest(folder: Any) -> None:
    path = folder("m", attack="a", mitigation="b", seed=3)
    spec = resolve([TargetSpec("x", path, attack="mine")], {"x": {"seed": 4}})[0]
    assert (spec.attack, spec.mitigation, spec.seed) == ("mine", "b", 4)


def test_labels_may_be_keyed_by_the_folder_as_given(folder: Any) -> None:
    path = folder("m")
    assert resolve([str(path)], {str(path): {"attack": "a"}})[0].attack == "a"


def test_folders_of_the_same_name_are_told_apart_by_their_parents(folder: Any) -> None:
    paths = [folder("one/model"), folder("two/model"), folder("other")]
    assert [s.name for s in resolve(paths)] == ["one/model", "two/model", "other"]


def test_the_same_target_twice_is_refused(folder: Any) -> None:
    path = folder("m")
    with pytest.raises(ResafeError, match="two targets are named"):
        resolve([path, path])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"n": {"attack": "a"}}, "labels name a target 'n' that is not evaluated"),
        ({"m": {"atack": "a"}}, "unknown label 'atack' of target m. Did you mean 'attack'?"),
    ],
)
def test_wrong_labels_are_refused(folder: Any, labels: dict[str, Any], message: str) -> None:
    with pytest.raises(ResafeError) as error:
        resolve([folder("m")], labels)
    assert message in str(error.value)


def test_a_missing_folder_is_found_before_any_work(tmp_path: Path, folder: Any) -> None:
    with pytest.raises(ResafeError, match="no such model folder"):
        resolve([folder("m"), tmp_path / "gone"])


def test_no_targets_and_odd_targets_are_refused() -> None:
    with pytest.raises(ResafeError, match="nothing to evaluate"):
        resolve([])
    odd: Any = 3
    with pytest.raises(ResafeError, match="cannot evaluate a int"):
        resolve([odd])


def test_a_spec_without_folder_and_answers_cannot_be_opened() -> None:
    with pytest.raises(ResafeError, match="names neither"), opened(TargetSpec("x")):
        pass


def generated(monkeypatch: pytest.MonkeyPatch, *texts: str) -> None:
    answers = [Answer(t, 9, False) for t in texts]
    monkeypatch.setattr("resafe.generate.generate", lambda *_: answers)


@pytest.mark.parametrize("guard", ["offline", {"guard_model": "offline", "refusal": "No.", "threshold": None}])
def test_a_guard_replaces_what_it_blocks_and_ends_those_answers(
    monkeypatch: pytest.MonkeyPatch, word_guard: list[str], guard: Any
) -> None:
    monkeypatch.setattr("resafe.guards.filter.load_guard", __import__("resafe.guards").guards.load_guard)
    generated(monkeypatch, "take the lid", "stir it", "?")
    target = FolderTarget(TargetSpec("m", guard=guard), Loaded(None, None, Path()))
    refusal = "No." if isinstance(guard, dict) else "I'm sorry, but I can't help with that."
    asked = [[{"role": "user", "content": "q"}]] * 3
    assert target.answer(asked, 8) == [Answer(refusal, 9, True), Answer("stir it", 9, False), Answer(refusal, 9, True)]
    assert word_guard == ["offline"] and target.guard.startswith("word guard v1@")


def test_without_a_guard_answers_pass_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    generated(monkeypatch, "take the lid")
    target = FolderTarget(TargetSpec("m"), Loaded(None, None, Path()))
    assert target.answer([[{"role": "user", "content": "q"}]], 8) == [Answer("take the lid", 9, False)]
    assert target.guard == ""
