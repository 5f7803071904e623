"""Targets get distinct names, and their labels and guard from where they should."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from resafe.backends import Request
from resafe.errors import ResafeError
from resafe.eval import TargetSpec, evaluate
from resafe.eval.targets import costs, opened, resolve
from resafe.generate import Answer
from resafe.guards import Verdict

REFUSAL = "I'm sorry, but I can't help with that."


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


class Answering:
    """A back-end that gives the texts it was made with, cut off by the token limit."""

    name, identity, template = "m", None, ""

    def __init__(self, *texts: str, error: str = "") -> None:
        self.texts, self.error = texts, error

    def close(self) -> None:
        pass

    def rendered(self, request: Request) -> list[Any]:
        return list(request.messages)

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        for i, text in enumerate(self.texts):
            yield i, Answer(text, 9, False, self.error)


def revealed(target: TargetSpec, make_suite: Callable[..., Path], **how: Any) -> list[Any]:
    backend: Any = target.answers
    found = evaluate([target], [make_suite(n=len(backend.texts))], reveal=True, **how)
    return [t["response"] for t in found.transcripts]


@pytest.mark.parametrize("guard", ["offline", {"guard_model": "offline", "refusal": "No.", "threshold": None}])
@pytest.mark.parametrize("stored", [True, False])
def test_a_guard_replaces_what_it_blocks(
    monkeypatch: pytest.MonkeyPatch, word_guard: list[str], guard: Any, make_suite: Callable[..., Path], tmp_path: Path, stored: bool
) -> None:
    monkeypatch.setattr("resafe.guards.filter.load_guard", __import__("resafe.guards").guards.load_guard)
    refusal = "No." if isinstance(guard, dict) else "I'm sorry, but I can't help with that."
    spec = TargetSpec("m", answers=Answering("take the lid", "stir it", "?"), guard=guard)
    assert revealed(spec, make_suite, store=tmp_path / "store" if stored else None) == [refusal, "stir it", refusal]


def test_the_guard_is_part_of_how_a_target_was_measured(
    monkeypatch: pytest.MonkeyPatch, word_guard: list[str], make_suite: Callable[..., Path]
) -> None:
    monkeypatch.setattr("resafe.guards.filter.load_guard", __import__("resafe.guards").guards.load_guard)
    specs = [TargetSpec(n, answers=Answering("stir it"), guard=g) for n, g in (("a", "offline"), ("b", None))]
    found = evaluate(specs, [make_suite(n=1)])
    assert found.meta["targets"]["a"]["guard"].startswith("word guard v1@") and found.meta["targets"]["b"]["guard"] == ""


def test_another_guard_than_the_manifest_names_is_said(
    monkeypatch: pytest.MonkeyPatch, word_guard: list[str], make_suite: Callable[..., Path]
) -> None:
    monkeypatch.setattr("resafe.guards.filter.load_guard", __import__("resafe.guards").guards.load_guard)
    for identity, said in (("word guard v0@own/block", True), ("word guard v1@own/block", False)):
        lines: list[str] = []
        guard = {"guard_model": "offline", "refusal": "No.", "threshold": None, "identity": identity}
        evaluate([TargetSpec("m", answers=Answering("stir it"), guard=guard)], [make_suite(n=1)], log=lines.append)
        assert any("written with the guard word guard v0@own/block; measured with word guard v1@own/block" in x for x in lines) is said


def test_a_missing_answer_stays_missing_behind_a_guard(
    monkeypatch: pytest.MonkeyPatch, word_guard: list[str], make_suite: Callable[..., Path]
) -> None:
    monkeypatch.setattr("resafe.guards.filter.load_guard", __import__("resafe.guards").guards.load_guard)
    spec = TargetSpec("m", answers=Answering("", error="timeout"), guard="offline")
    row = evaluate([spec], [make_suite(n=1)]).row("m", "mine", "nonrefusal_rate", "rules")
    assert row is not None and (row["value"], row["n_scored"], row["n"]) == (None, 0, 1)


def test_a_served_model_is_named_by_its_model() -> None:
    found = resolve(["chat:org/model-1@http://localhost:8000/v1", "openai:gpt-x"])
    assert [(s.name, s.served.partition(":")[0], s.folder) for s in found] == [("org/model-1", "chat", None), ("gpt-x", "openai", None)]


def test_a_folder_for_vllm_keeps_its_manifest(folder: Callable[..., Path]) -> None:
    path = folder("tuned", mitigation="mix_safety")
    [spec] = resolve([f"vllm:{path}"])
    assert (spec.name, spec.mitigation, spec.served) == ("tuned", "mix_safety", f"vllm:{path}")


def test_costs_of_training_and_repairing_add_up_along_the_manifests() -> None:
    train = {"verb": "train", "usage": {"cpu_seconds": 10.0, "peak_rss_mb": 300.0, "tokens": 50}}
    first = {"verb": "repair", "usage": {"cpu_seconds": 2.0, "peak_rss_mb": 500.0}, "before": train}
    second = {"verb": "repair", "usage": {"cpu_seconds": 3.0, "peak_rss_mb": 400.0}, "before": first}
    assert costs(second) == {"train": {"cpu_seconds": 10.0, "peak_rss_mb": 300.0, "tokens": 50}, "repair": {"cpu_seconds": 5.0, "peak_rss_mb": 500.0}}
    assert costs({"verb": "train"}) == {}


class Outage:
    """A guard that is not reached for the answer "lost"."""

    name, identity, scale = "chat:g", "outage", None

    def classify(self, exchanges: Sequence[Any]) -> list[Verdict]:
        return [Verdict(None, unscored="api_error") if r == "lost" else Verdict(None, unscored="parse") if r == "odd" else Verdict(r == "bad") for _, r in exchanges]


def test_an_answer_whose_guard_was_not_reached_is_missing_and_never_a_refusal(
    monkeypatch: pytest.MonkeyPatch, word_guard: list[str], make_suite: Callable[..., Path]
) -> None:
    monkeypatch.setattr("resafe.guards.filter.load_guard", lambda _: Outage())
    lines: list[str] = []
    spec = TargetSpec("m", answers=Answering("fine", "bad", "lost", "odd"), guard="chat:g@http://h#qwen3guard")
    found = evaluate([spec], [make_suite(n=4)], reveal=True, log=lines.append)
    assert [(t["response"], t.get("error"), t.get("blocked")) for t in found.transcripts] == [
        ("fine", None, None), (REFUSAL, None, True), ("", "guard_api_error", None), (REFUSAL, None, True),
    ]  # fmt: skip
    row = found.row("m", "mine", "nonrefusal_rate", "rules")
    assert row is not None and (row["n_scored"], row["n"]) == (3, 4)
    assert found.meta["targets"]["m"]["guard_faults"] == {"api_error": 1} and any("could not judge 1 (api_error)" in line for line in lines)


def test_a_guard_that_breaks_is_one_line(monkeypatch: pytest.MonkeyPatch, word_guard: list[str], make_suite: Callable[..., Path]) -> None:
    class Broken(Outage):
        def classify(self, exchanges: Sequence[Any]) -> list[Verdict]:
            raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr("resafe.guards.filter.load_guard", lambda _: Broken())
    with pytest.raises(ResafeError, match="the guard of target m failed: RuntimeError: out of memory$"):
        evaluate([TargetSpec("m", answers=Answering("fine"), guard="offline")], [make_suite(n=1)])


def test_a_plain_target_cannot_go_on_with_a_begun_answer(make_suite: Callable[..., Path], word_guard: list[str], scripted: Any) -> None:
    found = evaluate([scripted("t")], [make_suite(n=3)], variants=["prefill"])
    row = found.row("t", "mine+prefill", "harmfulness_rate", "offline")
    assert row is not None and (row["n_scored"], row["n"]) == (0, 3)
    assert found.items["t"]["mine+prefill"].unscored["offline"] == {"prefill_unsupported": 3}


def test_fine_tunes_of_other_data_are_no_repetitions_of_each_other(folder: Any) -> None:
    def made(name: str, seed: int, data: str) -> Path:
        path: Path = folder(name, verb="train", seed=seed, model="m", settings={}, mitigations=[], data={"sha256": data})
        return path

    assert [s.seed for s in resolve([made("a", 0, "x"), made("b", 1, "x")])] == [0, 1]
    assert [s.seed for s in resolve([made("c", 0, "x"), made("d", 1, "y")])] == [None, None]
    given = resolve([made("e", 0, "x"), made("f", 1, "y")], {"e": {"seed": 0}, "f": {"seed": 1}})
    assert [s.seed for s in given] == [0, 1]


def test_what_nobody_said_anything_of_is_called_by_its_name(
    make_suite: Callable[..., Path], word_guard: list[str], scripted: Any
) -> None:
    from resafe.eval.view import lines

    assert [x.label for x in lines(evaluate([scripted("mine")], [make_suite()]))] == ["mine"]
    said = evaluate([scripted("mine")], [make_suite()], labels={"mine": {"attack": "none"}})
    assert [x.label for x in lines(said)] == ["before fine-tuning"]


@pytest.mark.parametrize("spec", ["chat:m@nowhere", "batch:m", "chat:m@http://alice:S3CRET@host/v1", "chat:m@http://host/v1?key=K3Y"])
def test_a_served_model_that_cannot_be_one_is_refused_before_others_answer(spec: str, scripted: Any, make_suite: Callable[..., Path]) -> None:
    first = scripted("t")
    with pytest.raises(ResafeError) as error:
        evaluate([first, spec], [make_suite()])
    assert first.asked == [] and "S3CRET" not in str(error.value) and "K3Y" not in str(error.value)
