"""A killed evaluation goes on where it was; an answer or verdict is used again only if nothing that decides it changed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from resafe.backends import Request, Sampling
from resafe.eval import evaluate, keeping
from resafe.eval.keeping import KeepingGuard, address
from resafe.fingerprint import model_fingerprint
from resafe.generate import Answer
from resafe.guards import Exchange, Verdict
from resafe.store import Store

Make = Callable[..., Path]
REFUSAL = "I'm sorry, but I can't help with that."


class Counting:
    """A back-end that answers with the prompt, and counts how often it is asked; `faults` fail the first time."""

    template = "t"

    def __init__(self, identity: str | None = "weights 1", delay: float = 0.0, faults: Sequence[str] = ()) -> None:
        self.name, self.identity, self.delay, self.faults = "m", identity, delay, set(faults)
        self.asked: list[str] = []

    def close(self) -> None:
        pass

    def rendered(self, request: Request) -> list[Any]:
        return list(request.messages)

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        for i in reversed(range(len(requests))):
            prompt = requests[i].messages[-1]["content"]
            self.asked.append(prompt)
            time.sleep(self.delay)
            if prompt in self.faults:
                self.faults.remove(prompt)
                yield i, Answer(error="api_error")
            else:
                yield i, Answer(f"{REFUSAL} {prompt} {requests[i].sampling.seed}", 5, True)


def answers(output: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (output / "transcripts.jsonl").read_text().splitlines()]
    return {r["id"]: r["response"] for r in rows}


def test_the_second_run_asks_nothing_and_finds_the_same(make_suite: Make, tmp_path: Path) -> None:
    suite, first, second = make_suite(), Counting(), Counting()
    found = [
        evaluate([m], [suite], output=tmp_path / str(i), store=tmp_path / "store", reveal=True) for i, m in enumerate((first, second))
    ]
    assert len(first.asked) == 10 and second.asked == []
    assert found[0].rows == found[1].rows and answers(tmp_path / "0") == answers(tmp_path / "1")
    assert [f.meta["targets"]["m"]["reused"] for f in found] == [0, 10]


def test_without_a_store_nothing_is_kept(make_suite: Make, tmp_path: Path) -> None:
    suite, again = make_suite(), Counting()
    evaluate([Counting()], [suite])
    evaluate([again], [suite], store=tmp_path / "store")
    assert len(again.asked) == 10


@pytest.mark.parametrize("change", ["identity", "prompt", "length", "version", "suite"])
def test_a_change_of_what_decides_an_answer_is_a_miss(make_suite: Make, tmp_path: Path, change: str) -> None:
    evaluate([Counting()], [make_suite()], store=tmp_path / "store")
    again = Counting("weights 2" if change == "identity" else "weights 1")
    more: dict[str, dict[str, Any]] = {"length": {"max_new_tokens": 7}, "version": {"version": 2}, "suite": {"name": "other"}}
    suite = make_suite(**more.get(change, {}))
    if change == "prompt":
        data = suite.with_suffix(".csv")
        data.write_text(data.read_text().replace("q3", "q33"))
    evaluate([again], [suite], store=tmp_path / "store")
    assert again.asked == ["q33"] if change == "prompt" else len(again.asked) == 10


@pytest.mark.parametrize("change", ["temperature: 0.8", "temperature: 0.7, top_p: 0.9", "temperature: 0.7, system: Be brief.", "temperature: 0.7, prefill: Sure"])
def test_a_variant_that_was_changed_under_its_name_is_asked_again(make_suite: Make, tmp_path: Path, change: str) -> None:
    ways, suite, runs = tmp_path / "ways.yaml", make_suite(), [Counting() for _ in range(4)]
    for run, keys in zip(runs, ("temperature: 0.7", "temperature: 0.7", change, "temperature: 0.7, samples: 3")):
        ways.write_text(f"warm: {{{keys}}}\n")
        evaluate([run], [suite], store=tmp_path / "store", variants=[ways])
    assert [len(run.asked) for run in runs] == [20, 0, 10, 20]  # of three samples, the first is there
    seeded = Counting()
    evaluate([seeded], [suite], store=tmp_path / "store", variants=[ways], seed=1)
    assert len(seeded.asked) == 30  # the same draw, other samples


def test_everything_that_decides_an_answer_is_in_its_address() -> None:
    ask = Request([{"role": "user", "content": "hi"}], 8, Sampling(0.7, 0.9, 3))
    others = {"temperature": 0.8, "top_p": 0.8, "seed": 4}
    assert set(others) == {f.name for f in fields(Sampling)}  # a new one must be here too
    base = (["suite", 1, "id", 0], [1, 2], ask, "weights")
    sampled = [replace(ask, sampling=replace(ask.sampling, **{name: value})) for name, value in others.items()]
    changed = [(base[0], base[1], other, base[3]) for other in (*sampled, replace(ask, max_new_tokens=9))]
    origins = [["other", 1, "id", 0], ["suite", 2, "id", 0], ["suite", 1, "id2", 0], ["suite", 1, "id", 1]]
    changed += [(o, *base[1:]) for o in origins] + [(base[0], [1, 3], ask, "weights"), (*base[:3], "other weights")]
    assert len({address(*asked) for asked in (base, *changed)}) == 1 + len(changed) == 11


def test_a_missing_answer_is_unscored_not_kept_and_asked_again(make_suite: Make, tmp_path: Path) -> None:
    suite, broken, again = make_suite(), Counting(faults=["q3"]), Counting()
    row = evaluate([broken], [suite], store=tmp_path / "store").row("m", "mine", "nonrefusal_rate", "rules")
    assert row is not None and (row["n"], row["n_scored"], row["bound_low"], row["bound_high"]) == (10, 9, 0.0, 0.1)
    evaluate([again], [suite], store=tmp_path / "store")
    assert again.asked == ["q3"]


def test_a_served_model_is_remembered_until_its_evaluation_is_complete(make_suite: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stops(Counting):
        def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
            for n, found in enumerate(super().stream(requests)):
                if n == 4:
                    raise KeyboardInterrupt
                yield found

    runs: list[Counting] = [Stops(None), Counting(None), Counting(None)]
    served = iter(runs)
    monkeypatch.setattr("resafe.eval.targets.open_backend", lambda spec, **_: next(served))
    how: dict[str, Any] = {"output": tmp_path / "out", "store": tmp_path / "store"}
    with pytest.raises(KeyboardInterrupt):
        evaluate(["chat:m@http://localhost:1"], [make_suite()], **how)
    evaluate(["chat:m@http://localhost:1"], [make_suite()], **how)
    evaluate(["chat:m@http://localhost:1"], [make_suite()], **how)
    assert [len(r.asked) for r in runs] == [5, 6, 10]


def test_two_hundred_kills_lose_no_completed_row(make_suite: Make, tmp_path: Path) -> None:
    """evaluate() is killed (SIGKILL) at random moments until it gets through; no prompt that was kept is asked again."""
    suite, rng, asked = make_suite(n=400), random.Random(1), tmp_path / "asked"
    kills, kept = 0, 0
    asked.touch()

    class Noting(Counting):
        def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
            for i, answer in super().stream(requests):
                yield i, answer  # on resumption, the answer before has been kept
                with asked.open("a") as f:
                    f.write(f"{requests[i].messages[-1]['content']}\n")

    while kills < 200:
        child = os.fork()
        if child == 0:
            evaluate([Noting(delay=0.0003)], [suite], store=tmp_path / "store", output=tmp_path / "out")
            os._exit(0)
        time.sleep(rng.uniform(0.003, 0.02))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        kills += os.WIFSIGNALED(status)
        noted = asked.read_text().splitlines()
        assert len(noted) == len(set(noted)), "a completed row was asked for again"
        log = Store(tmp_path / "store").log("answers", "weights 1")
        assert len(log) - 1 >= len(noted) >= kept, "a completed row is gone"
        kept = len(noted)
        log.close()
        if os.WIFEXITED(status):  # complete: start over with another store
            shutil.rmtree(tmp_path / "store")
            asked.write_text("")
            kept = 0
    last = Noting()
    found = evaluate([last], [suite], store=tmp_path / "store")
    assert found.meta["targets"]["m"]["reused"] + len(last.asked) == 400
    assert found.items == evaluate([Noting()], [suite]).items, "not what an evaluation without a break finds"


class CountingGuard:
    name, scale = "offline", None

    def __init__(self, identity: str = "guard 1") -> None:
        self.identity = identity
        self.seen: list[str] = []

    def classify(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        self.seen += [r for _, r in exchanges]
        return [Verdict(None, unscored="timeout") if r == "?" else Verdict("x" in r, 0.25, categories=("a",)) for _, r in exchanges]


def asked_of(guard: CountingGuard, store: Store, *responses: str) -> list[Verdict]:
    return KeepingGuard(guard, store).classify([([{"role": "user", "content": "q"}], r) for r in responses])


def test_verdicts_are_kept_and_read_back_unchanged(tmp_path: Path) -> None:
    store, first, second = Store(tmp_path), CountingGuard(), CountingGuard()
    assert asked_of(first, store, "x", "y") == asked_of(second, store, "x", "y") == [Verdict(True, 0.25, categories=("a",)), Verdict(False, 0.25, categories=("a",))]
    assert second.seen == []


def test_another_judge_is_asked_anew(tmp_path: Path) -> None:
    store, other = Store(tmp_path), CountingGuard("guard 2: one word of its prompt changed")
    asked_of(CountingGuard(), store, "x")
    asked_of(other, store, "x")
    assert other.seen == ["x"]


def test_an_unscored_exchange_is_asked_again(tmp_path: Path) -> None:
    store, again = Store(tmp_path), CountingGuard()
    asked_of(CountingGuard(), store, "?", "x")
    asked_of(again, store, "?", "x", "z")
    assert again.seen == ["?", "z"]


def test_a_new_judge_does_not_generate_again(make_suite: Make, tmp_path: Path) -> None:
    suite, again = make_suite(), Counting()
    evaluate([Counting()], [suite], store=tmp_path / "store")
    found = evaluate([again], [suite], judges=["keyword_qi"], store=tmp_path / "store")
    assert again.asked == [] and found.row("m", "mine", "nonrefusal_rate", "keyword_qi") is not None


def one_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def retemplated(folder: Path) -> None:
    file = next((f for f in folder.glob("chat_template.jinja")), folder / "tokenizer_config.json")
    file.write_text(file.read_text() + ("{# #}" if file.suffix == ".jinja" else "\n"))


CHANGES: dict[str, Callable[[Path], None]] = {
    "weights": lambda f: one_byte(f / "model.safetensors"),
    "template": retemplated,
    "tokenizer": lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text() + "\n"),
    "config": lambda f: (f / "generation_config.json").write_text((f / "generation_config.json").read_text() + "\n"),
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_one_byte_of_a_model_makes_another_fingerprint(aligned: Path, tmp_path: Path, what: str) -> None:
    folder = shutil.copytree(aligned, tmp_path / "m")
    before = model_fingerprint(folder)
    assert model_fingerprint(folder) == before == model_fingerprint(shutil.copytree(aligned, tmp_path / "copy"))
    CHANGES[what](folder)
    assert model_fingerprint(folder) != before


def test_one_byte_of_an_adapter_or_its_base_makes_another_fingerprint(aligned: Path, tmp_path: Path) -> None:
    base, adapter = shutil.copytree(aligned, tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    save_file({"w": torch.ones(4)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    seen = [model_fingerprint(adapter)]
    one_byte(adapter / "adapter_model.safetensors")
    seen.append(model_fingerprint(adapter))
    one_byte(base / "model.safetensors")
    seen.append(model_fingerprint(adapter))
    assert len(set(seen)) == 3


def test_a_changed_weight_is_evaluated_anew(aligned: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(aligned, tmp_path / "m")
    for run, expected in enumerate((0, 12, 0)):
        found = evaluate([folder], ["lab_harm"], limit=12, store=tmp_path / "store")
        assert found.meta["targets"]["m"]["reused"] == expected
        if run == 1:
            weights = load_file(folder / "model.safetensors")
            weights["model.norm.weight"][0] += 0.5
            save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_progress_is_said_while_answers_come(make_suite: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "EVERY", 0.0)
    lines: list[str] = []
    evaluate([Counting()], [make_suite()], log=lines.append)
    assert any(line.startswith("m: 4 of 10, about") for line in lines)


def test_what_a_served_judge_said_is_forgotten_with_its_evaluation(make_suite: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[CountingGuard] = []

    def load(spec: str) -> CountingGuard:
        made.append(CountingGuard())
        return made[-1]

    monkeypatch.setattr("resafe.guards.load_guard", load)
    for _ in range(2):
        evaluate([Counting()], [make_suite()], judges=["chat:j@http://127.0.0.1:1/v1#qi_rubric"], store=tmp_path / "store")
    assert [len(g.seen) for g in made] == [10, 10]
    made.clear()
    for _ in range(2):
        evaluate([Counting()], [make_suite()], judges=["guard.safetensors"], store=tmp_path / "store")
    assert [len(g.seen) for g in made] == [10, 0]


def test_results_remove_what_an_earlier_evaluation_revealed(make_suite: Make, tmp_path: Path) -> None:
    for name in ("transcripts.jsonl", "transcripts.html", "audit.json"):
        (tmp_path / name).write_text("old")
    evaluate([Counting()], [make_suite()], output=tmp_path)
    assert not any((tmp_path / n).exists() for n in ("transcripts.jsonl", "transcripts.html", "audit.json"))
