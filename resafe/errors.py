"""The one kind of error that users see: what is wrong, where, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ResafeError(Exception):
    """Bad input or an impossible request; printed as one line, exit code 2."""

    exit_code = 2


def suggest(name: str, choices: Iterable[str]) -> str:
    """A sentence for an error about an unknown name: the nearest known one, else all of them."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(known) or 'none'}."


def first_line(error: Exception) -> str:
    """An error's text without its further lines; its type where it has none, or where the text is a mere key."""
    if isinstance(error, KeyError):
        return f"KeyError: {error}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
