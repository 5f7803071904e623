"""Whether an answer to a utility prompt is right, decided by rules."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MARKER = re.compile(r"####|answer\s+is|answer\s*:", re.IGNORECASE)


def last_number(text: str) -> Decimal | None:
    """The number that a worked answer ends in.

    Looked for after the last '####', 'answer is' or 'answer:', to the end of that sentence or line; else anywhere.
    """
    markers = list(_MARKER.finditer(text))
    if markers:
        conclusion = re.split(r"\n|\.\s", text[markers[-1].end() :].lstrip(), maxsplit=1)[0]
        if (found := _last(conclusion)) is not None:
            return found
    return _last(text)


def exact_number(response: str, reference: str) -> bool:
    """Whether the response ends in the reference's number: 72, 72.0 and $72 are equal, 1,000 is 1000."""
    wanted = last_number(reference)
    return wanted is not None and last_number(response) == wanted


def _last(text: str) -> Decimal | None:
    numbers = _NUMBER.findall(text)
    try:
        return Decimal(numbers[-1].replace(",", "")) if numbers else None
    except InvalidOperation:
        return None
