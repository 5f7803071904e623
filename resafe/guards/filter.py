"""An output filter: a guard and what happens to the answers that it blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resafe.errors import ResafeError
from resafe.guards import Guard, Verdict, load_guard
from resafe.guards._base import valid_score
from resafe.rows import Message


@dataclass(frozen=True)
class OutputFilter:
    """Replaces the answers that `guard` calls harmful, and those on which it does not decide (unless `on_error` is allow).

    `threshold` in [0, 1] goes before the guard's own decision where it has a score, or else a rating, moved from the guard's
    scale to [0, 1]. A guard that only rates (StrongREJECT) decides nothing without one.
    """

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
        strength = self._strength(verdict)
        if strength is not None and not valid_score(strength):  # NaN, or off its scale: a fault, whatever else was said
            return self.on_error == "block"
        if self.threshold is not None and strength is not None:
            return strength >= self.threshold
        return self.on_error == "block" if verdict.harmful is None else verdict.harmful

    def _strength(self, verdict: Verdict) -> float | None:
        if verdict.unscored or verdict.score is not None or verdict.rating is None or self.guard.scale is None:
            return verdict.score
        low, high = self.guard.scale
        return (verdict.rating - low) / (high - low)

    def apply(self, conversations: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[str]:
        """The answers, blocked ones replaced by the refusal. Raises ResafeError if the guard loses count."""
        verdicts = self.guard.classify([(list(c), a) for c, a in zip(conversations, answers)])
        if len(verdicts) != len(answers):
            raise ResafeError(f"guard {self.guard.name} gave {len(verdicts)} verdicts on {len(answers)} answers.")
        return [self.refusal if self.blocks(v) else a for v, a in zip(verdicts, answers)]


def apply(entry: Mapping[str, Any], conversations: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[str]:
    """`OutputFilter.from_entry(entry).apply(...)`."""
    return OutputFilter.from_entry(entry).apply(conversations, answers)
