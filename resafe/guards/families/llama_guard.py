"""Llama Guard 3 and 4: safe, or unsafe and the hazards S1 to S14.

https://arxiv.org/abs/2312.06674; categories as in the model cards of github.com/meta-llama/PurpleLlama. The prompt, with the
list of hazards, is the chat template that the model brings; its text was not checked. The answer begins with two line breaks,
which are written for the model; the next token decides.
"""

from __future__ import annotations

import re

from resafe.guards._base import Verdict, unscored
from resafe.guards.families._base import Choice, Family, Probabilities

_HAZARDS = r"\s*\n\s*((?:S(?:1[0-4]|[1-9]))(?:, ?S(?:1[0-4]|[1-9]))*)"
_WHOLE = re.compile(rf"safe|unsafe{_HAZARDS}")


def parse_llama_guard(text: str) -> Verdict:
    """`safe`, or `unsafe` and a line of categories."""
    if not (found := _WHOLE.fullmatch(text.strip())):
        return unscored("parse")
    names = _names(found[1] or "")
    return Verdict(bool(names), categories=names)


def weigh(probabilities: Probabilities, tail: str) -> Verdict:
    """From the probabilities of safe and unsafe; no categories if their line is malformed."""
    safe, unsafe = probabilities[0]
    found = re.fullmatch(_HAZARDS, tail.rstrip()) if unsafe > safe else None
    return Verdict(unsafe > safe, unsafe, categories=_names(found[1]) if found else ())


def _names(text: str) -> tuple[str, ...]:
    return tuple(c.strip() for c in text.split(",") if c)


FAMILY = Family(
    "llama_guard", parse_llama_guard, "llamaguard", choices=(Choice((("safe",), ("unsafe",)), "\n\n"),), weigh=weigh, tail=True
)
