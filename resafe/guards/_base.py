"""The contract of a guard: exchanges in, verdicts out. What a guard cannot score stays unscored, with the reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from resafe.rows import Message

Exchange = tuple[list[Message], str]  # the conversation up to the last user turn, and the response to it


@dataclass(frozen=True)
class Verdict:
    """What a guard says of one exchange; None where it says nothing.

    `unscored` is the reason for a missing verdict: parse, out_of_range, refusal, api_error, timeout, truncated or empty.
    """

    harmful: bool | None
    score: float | None = None  # P(harmful) where the guard has one
    refusal: bool | None = None
    categories: tuple[str, ...] = ()
    unscored: str | None = None


class Guard(Protocol):
    """Classifies exchanges, in their order. `identity` changes whenever a verdict could: it is part of every number."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str: ...

    def classify(self, exchanges: Sequence[Exchange]) -> list[Verdict]: ...


def unscored(reason: str) -> Verdict:
    """No verdict, and why."""
    return Verdict(harmful=None, unscored=reason)


def valid_score(value: object) -> bool:
    """Whether `value` is a probability: a real number in [0, 1], not a bool and not NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 1
