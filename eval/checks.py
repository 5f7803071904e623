"""Whether an answer to a utility prompt is right, decided by rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

_NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MARKER = re.compile(r"####|answer\s+is|answer\s*:", re.IGNORECASE)
_FENCED = re.compile(r"```[\w+-]*\n(.*?)\n?```", re.DOTALL)
_OPEN = r"[\s*_`\"'(\[$]{0,8}(?:\\boxed\{)?"  # emphasis, brackets, LaTeX
_AFTER = r"(?=['’]?(?:[^\w\s'’-]|\s*(?:\n|$)|\s+(?:as|because|for|is|since|which)\b))"  # so 'A cat' is not A
_OPTION = rf"(?:(?:[Oo]ption|[Cc]hoice|[Ll]etter)\s{{1,2}})?[*_(\[]{{0,4}}([A-H]){_AFTER}"
_CONCLUDED = re.compile(rf"(?i:answer\s+is\s*:?|answer[*_]{{0,2}}\s*:){_OPEN}{_OPTION}")
_OPENING = re.compile(_OPEN + _OPTION)
_LISTED = re.compile(r"\n[^\S\n]*[*_(\[]{0,4}[A-H][).:]")
_ANOTHER = re.compile(r"\W*(?:,|/|&|\bor\b|\band\b)\s*\(?[A-H](?![\w'’])")


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


def exact(response: str, reference: str) -> bool:
    """Whether the whole response is the reference.

    White space, a code fence around everything and a full stop or semicolon at the end make no difference; case does.
    """
    return _plain(response) == _plain(reference)


def choice(response: str, reference: str) -> bool:
    """Whether the response chooses the letter `reference`."""
    return chosen(response) == reference.strip()


def chosen(response: str) -> str:
    """The letter A to H that a response chooses; empty when it chooses none, or two.

    Read after the last 'answer is' or 'answer:' that a letter follows ('The correct answer is **(B)** because ...'),
    else at the very beginning ('B', '(B) cats', 'Option B.'). After the letter must come punctuation, the end of the
    line, or a reason; 'Answer: A cat' does not choose A, nor does a list of the options.
    """
    concluded = list(_CONCLUDED.finditer(response))
    found = concluded[-1] if concluded else _OPENING.match(response)
    if not found or _ANOTHER.match(response, found.end()) or not concluded and _LISTED.search(response):
        return ""
    return found[1]


def unfit(check: str, reference: str, row: Mapping[str, Any]) -> str:
    """Why a row of a suite cannot be checked by `check`; empty when it can."""
    if check == "ifeval":
        from resafe.eval import ifeval

        return ifeval.unfit(row)
    if check == "choice" and not re.fullmatch(r"\s*[A-H]\s*", reference):
        return f"its reference must be one letter from A to H, not '{reference}'"
    if check == "exact_number" and last_number(reference) is None:
        return "its reference holds no number"
    if check == "exact" and not _plain(reference):
        return "it has no reference"
    return ""


def _plain(text: str) -> str:
    fenced = _FENCED.fullmatch(text.strip())
    return " ".join((fenced[1] if fenced else text).split()).rstrip(".; ")


def _last(text: str) -> Decimal | None:
    numbers = _NUMBER.findall(text)
    try:
        return Decimal(numbers[-1].replace(",", "")) if numbers else None
    except InvalidOperation:
        return None
