"""Is a response language at all? A gate, not a quality score: judges misread the rubble that damaged models emit.

Evidence that judges do: arXiv 2606.03648. A short right answer ("7", "refuse .") is coherent. The thresholds, each far
from what ordinary prose, lists, tables and code reach:

| fault          | when                                                                                            |
|----------------|-------------------------------------------------------------------------------------------------|
| `empty`        | no letter, digit or symbol                                                                      |
| `repetition`   | one word 8 times in a row, or one letter 20 times; or half of the four-word runs are repeats    |
|                | (24 words or more)                                                                              |
| `unterminated` | stopped by the token limit while a third of the last 60 words' four-word runs are repeats       |
| `garble`       | over 60 % of the visible characters are neither letters nor digits, the rules of tables aside   |
|                | (20 characters or more); or over 2 % are replacement or control characters                      |
| `drift`        | over half of the letters (20 or more) are of scripts that the prompt does not use               |

`drift` misreads requests to translate into another script; the other faults do not depend on the prompt.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

WORD_RUN, LETTER_RUN = 8, 20
REPEATED, REPEATED_AT_LIMIT, TAIL = 0.5, 0.33, 60
SYMBOLS, BROKEN, FOREIGN = 0.6, 0.02, 0.5
SOME_WORDS, SOME_CHARACTERS, SOME_LETTERS = 24, 20, 20
RULES = "|-"  # what tables are drawn with

_LETTER_RUN = re.compile(rf"([^\W\d_])\1{{{LETTER_RUN - 1},}}")


def fault(response: str, prompt: str = "", finished: bool = True) -> str:
    """What is wrong with a response (a name of the table above); "" for a coherent one."""
    if not any(_visible(c) for c in response):
        return "empty"
    words = _words(response)
    if _longest_run(words) >= WORD_RUN or _LETTER_RUN.search(response):
        return "repetition"
    if len(words) >= SOME_WORDS and repeated(words) >= REPEATED:
        return "repetition"
    if not finished and len(words) >= SOME_WORDS and repeated(words[-TAIL:]) >= REPEATED_AT_LIMIT:
        return "unterminated"
    if _garbled(response):
        return "garble"
    return "drift" if _drifted(response, prompt) else ""


def repeated(words: Sequence[str], length: int = 4) -> float:
    """Share of the runs of `length` words that occurred before, in [0, 1]."""
    runs = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _words(text: str) -> list[str]:
    """Words, case-folded; single letters where a text is written without spaces."""
    words = re.findall(r"\w+", text.casefold())
    spaced = sum(map(len, words)) <= 20 * max(1, len(words))
    return words if spaced else [c for c in text if c.isalnum()]


def _longest_run(words: Sequence[str]) -> int:
    longest = run = 1
    for a, b in zip(words, words[1:]):
        run = run + 1 if a == b else 1
        longest = max(longest, run)
    return longest


def _visible(c: str) -> bool:
    return not c.isspace() and unicodedata.category(c)[0] != "C"


def _garbled(text: str) -> bool:
    seen = [c for c in text if not c.isspace() and c not in RULES]
    broken = sum(c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cn", "Co") for c in seen)
    symbols = sum(unicodedata.category(c)[0] not in "LMN" for c in seen)
    return broken > BROKEN * len(seen) or (len(seen) >= SOME_CHARACTERS and symbols > SYMBOLS * len(seen))


def _drifted(response: str, prompt: str) -> bool:
    letters = [_script(c) for c in response if c.isalpha()]
    known = {_script(c) for c in prompt if c.isalpha()}
    foreign = sum(script not in known for script in letters)
    return bool(known) and len(letters) >= SOME_LETTERS and foreign > FOREIGN * len(letters)


def _script(c: str) -> str:
    """LATIN, CYRILLIC, CJK, ...: the first word of the character's name."""
    return "LATIN" if c.isascii() else unicodedata.name(c, "UNKNOWN").split()[0]
