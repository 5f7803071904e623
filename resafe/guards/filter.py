"""An output filter: a guard and what happens to the answers that it blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resafe.guards import Guard, Verdict, load_guard
from resafe.rows import Message


@dataclass(frozen=True)
class OutputFilter:
    """Replaces the answers that `guard` calls harmful; `threshold` overrides the guard's own decision where it has scores."""

    guard: Guard
    entry: dict[str, Any]  # JSON-able parameters, as a manifest holds them
    refusal: str
    threshold: float | None = None
    on_error: str = "block"

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> OutputFilter:
        """From a manifest's entry: guard_model, threshold, refusal, on_error."""
        return cls(
            guard=load_guard(entry["guard_model"]), entry=dict(entry), refusal=entry["refusal"],
            threshold=entry.get("threshold"), on_error=entry.get("on_error", "block"),
        )  # fmt: skip

    @property
    def identity(self) -> str:
        """The guard's identity with the decision rule: part of every number measured behind it."""
        return f"{self.guard.identity}@{'own' if self.threshold is None else self.threshold}/{self.on_error}"

    def blocks(self, verdict: Verdict) -> bool:
        """Whether an answer with this verdict is replaced."""
        if verdict.harmful is None:
            return self.on_error == "block"
        if self.threshold is not None and verdict.score is not None:
            return verdict.score >= self.threshold
        return verdict.harmful

    def apply(self, conversations: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[str]:
        """The answers, blocked ones replaced by the refusal."""
        verdicts = self.guard.classify([(list(c), a) for c, a in zip(conversations, answers)])
        return [self.refusal if self.blocks(v) else a for v, a in zip(verdicts, answers)]


def apply(entry: Mapping[str, Any], conversations: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[str]:
    """`OutputFilter.from_entry(entry).apply(...)`."""
    return OutputFilter.from_entry(entry).apply(conversations, answers)
