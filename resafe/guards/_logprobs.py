"""Log-probabilities as servers give them, and what they say of a family's choices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from resafe.guards.families import Choice
from resafe.guards.families._base import FLOOR

Seen = tuple[str, Mapping[str, float]]  # a token as it was written, and the log-probability of what could have stood there


def of_chat(logprobs: Any) -> list[Seen]:
    """From a chat completion; empty if the server gives none, or not in the documented shape."""
    try:
        return [(str(t.token), {str(o.token): o.logprob for o in t.top_logprobs}) for t in logprobs.content]
    except (AttributeError, TypeError):
        return []


def of_completion(logprobs: Any) -> list[Seen]:
    """From a text completion; empty if the server gives none, or not in the documented shape."""
    try:
        return [(str(t), dict(o)) for t, o in zip(logprobs.tokens, logprobs.top_logprobs, strict=True)]
    except (AttributeError, TypeError, ValueError):
        return []


def probabilities(choices: Sequence[Choice], tokens: Sequence[Seen]) -> list[list[float]] | None:
    """Of each choice's options, renormalised; None if a choice is not found, or its options were too unlikely together."""
    text, found = "".join(t for t, _ in tokens), []
    position = 0
    for choice in choices:
        lead = choice.lead.strip()
        position = text.find(lead, position)
        if position < 0 or not tokens:
            return None
        position += len(lead)
        shares = _shares(choice, _at(tokens, position))
        if shares is None:
            return None
        found.append(shares)
    return found or None


def _at(tokens: Sequence[Seen], position: int) -> Mapping[str, float]:
    """The alternatives at the first token that writes something other than space from `position` on."""
    end = 0
    for token, options in tokens:
        start, end = end, end + len(token)
        if end > position and token[max(0, position - start) :].strip():
            return options
    return {}


def _shares(choice: Choice, options: Mapping[str, float]) -> list[float] | None:
    mass = [0.0] * len(choice.options)
    for token, value in options.items():
        word = token.strip()
        fits = [i for i, forms in enumerate(choice.options) if word and any(f.strip().startswith(word) for f in forms)]
        if len(fits) == 1:
            if not isinstance(value, int | float) or not value <= 1e-3:  # NaN, or no logarithm of a probability
                return None
            mass[fits[0]] += math.exp(value)
    whole = sum(mass)
    return [m / whole for m in mass] if FLOOR <= whole <= 1.01 else None
