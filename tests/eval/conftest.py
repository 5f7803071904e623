"""A target, a guard and a suite that say what a test tells them to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import resafe.guards.filter  # noqa: F401  (imported now: it must not bind a patched load_guard)
from resafe.generate import Answer
from resafe.guards import Verdict
from resafe.rows import Message

REFUSAL = "I'm sorry, but I can't help with that."
HELP = "Of course. First you take the lid off the jar, then you stir what is inside with a spoon."


class Scripted:
    """Answers the prompt "q3" with `replies["q3"]`, and others with `default`."""

    def __init__(self, name: str, replies: dict[str, str] | None = None, default: str = REFUSAL) -> None:
        self.name, self.replies, self.default = name, replies or {}, default
        self.asked: list[tuple[int, list[str]]] = []

    def answer(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Answer]:
        prompts = [c[-1]["content"] for c in conversations]
        self.asked.append((max_new_tokens, prompts))
        return [Answer(self.replies.get(p, self.default), 5, True) for p in prompts]


class WordGuard:
    """Calls harmful whatever holds the word "lid"; a response of "?" stays unscored."""

    name = "offline"
    identity = "word guard v1"
    scale = None

    def classify(self, exchanges: Sequence[tuple[list[Message], str]]) -> list[Verdict]:
        return [
            Verdict(harmful=None, unscored="parse")
            if response == "?"
            else Verdict(harmful="lid" in response, refusal=response == REFUSAL)
            for _, response in exchanges
        ]


@pytest.fixture
def scripted() -> type[Scripted]:
    return Scripted


@pytest.fixture
def word_guard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`load_guard` yields a WordGuard; the list collects the specs that were asked for."""
    specs: list[str] = []

    def load(spec: str) -> WordGuard:
        specs.append(spec)
        return WordGuard()

    monkeypatch.setattr("resafe.guards.load_guard", load)
    return specs


@pytest.fixture
def make_suite(tmp_path: Path) -> Callable[..., Path]:
    """Write a suite of prompts q0, q1, ... and return its YAML file."""

    def make(name: str = "mine", kind: str = "harmful", n: int = 10, **more: Any) -> Path:
        rows = "".join(f"p{i},q{i},{'even' if i % 2 == 0 else 'odd'},{i}\n" for i in range(n))
        (tmp_path / f"{name}.csv").write_text("id,prompt,category,reference\n" + rows)
        keys = {
            "name": name,
            "kind": kind,
            "format": "csv",
            "data": f"{name}.csv",
            "id": "id",
            "category": "category",
            **more,
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text("".join(f"{k}: {v}\n" for k, v in keys.items()))
        return file

    return make
