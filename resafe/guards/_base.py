"""The contract of a guard: exchanges in, verdicts out. What a guard cannot score stays unscored, with the reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from resafe.rows import Message

Exchange = tuple[list[Message], str]  # the conversation up to the last user turn, and the response to it
Scale = tuple[float, float]  # the lowest and the highest rating

REASONS = ("parse", "out_of_range", "refusal", "api_error", "timeout", "truncated", "empty")


@dataclass(frozen=True)
class Verdict:
    """What a guard says of one exchange; None where it says nothing.

    `rating` is on the guard's own published scale (`Guard.scale`). `unscored` is the reason for a missing verdict, one of
    REASONS; nothing else is said then.
    """

    harmful: bool | None
    score: float | None = None  # P(harmful) where the guard has one
    refusal: bool | None = None
    categories: tuple[str, ...] = ()
    unscored: str | None = None
    rating: float | None = None


class Guard(Protocol):
    """Classifies exchanges, in their order. `identity` changes whenever a verdict could: it is part of every number.

    `scale` is None for guards that don't rate. A guard that tells refusals by how an answer opens says so with an attribute
    `reads_openings`: of an answer that was begun for the model, it is then also shown what the model went on with, alone.
    """

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str: ...

    @property
    def scale(self) -> Scale | None: ...

    def classify(self, exchanges: Sequence[Exchange]) -> list[Verdict]: ...


def unscored(reason: str) -> Verdict:
    """No verdict, and why."""
    return Verdict(harmful=None, unscored=reason)


def within(value: object, scale: Scale) -> bool:
    """Whether `value` is a real number on `scale`: not a bool, not NaN. Nothing is ever clipped onto a scale."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and scale[0] <= value <= scale[1]
    )


def valid_score(value: object) -> bool:
    """Whether `value` is a probability."""
    return within(value, (0, 1))
