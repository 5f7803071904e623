"""Words, sentences and language of a response, counted without downloaded data.

The published checkers count sentences with NLTK's trained Punkt model and capital words with its word tokenizer; here
both are rules. How often a verdict differs is in benchmarks/results/ifeval_agreement.json: almost only where a response
ends in an asterisk after its last full stop, which Punkt counts as a sentence.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_END = re.compile(r"(?<![.!?])([.!?]+)[\"')\]}”’*_]*\s+(?=\S)")
_NEVER_LAST = re.compile("mrs?|ms|dr|prof|st|mt|lt|col|gen|capt|sgt|rep|sen|gov|rev|hon|vs")
_NUMBERED = re.compile("no|fig|vol|pp?|ch|sec|approx")
_ABBREVIATED = re.compile(
    r"(?:[a-z]{1,2}\.)+[a-z]{1,2}|etc|inc|ltd|co|corp|jr|sr|al|est|dept|ave|blvd|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec"
)
_OPENERS = re.compile(
    "an?|the|this|that|these|those|i|you|s?he|it|we|they|there|here|i[nf]|on|at|when|while|after|but|and|so|however|its|his"
    "|her|their|our|my|for|as|then|what|who|how|why"
)
_BETWEEN_WORDS = re.compile(r"[\s,;:()\[\]{}<>\"“”«»?!@#$%&…]+|\.{2,}|--+")
_CONTRACTED = re.compile(r"(?<=\w)(n't|'(?:s|m|d|ll|re|ve))(?!\w)", re.IGNORECASE)


def words(text: str) -> int:
    """How many words: unbroken runs of letters, digits and underscores."""
    return len(re.findall(r"\w+", text))


def capital_words(text: str) -> int:
    """How many words are all capitals. A hyphenated word is one, a contraction two (DO N'T), as published."""
    return sum(word.isupper() for word in _BETWEEN_WORDS.split(_CONTRACTED.sub(r" \1", text)))


def sentences(text: str) -> int:
    """How many sentences: one more than the ends of sentences that text follows; 0 of blank text."""
    text = text.strip()
    around = (
        (text[max(m.start() - 20, 0) : m.start()], m[1], text[m.end() : m.end() + 20]) for m in _END.finditer(text)
    )
    return sum(_ends(*parts) for parts in around) + 1 if text else 0


def _ends(before: str, marks: str, after: str) -> bool:
    """Whether `marks` end a sentence, with the texts before and after them."""
    if marks[-1] != ".":
        return True
    word = before.split()[-1].lstrip("(\"'“‘*_[") if before and not before[-1].isspace() else ""
    opener: str = (re.findall(r"\w+", after) or [""])[0]
    if len(marks) > 1:  # an ellipsis
        return opener[:1].isupper()
    initial = re.fullmatch("[A-HJ-Z]", word)
    word = word.lower()
    if initial or _NEVER_LAST.fullmatch(word) or _NUMBERED.fullmatch(word) and opener[:1].isdigit():
        return False
    return not _ABBREVIATED.fullmatch(word) or opener[:1].isupper() and bool(_OPENERS.fullmatch(opener.lower()))


def has_language_detection() -> bool:
    return find_spec("langdetect") is not None


def language(text: str) -> str | None:
    """ISO 639-1 code of the language by langdetect, with a fixed seed; None for a text without letters to go by."""
    from langdetect.lang_detect_exception import LangDetectException

    detector = _factory().create()
    detector.append(text)
    try:
        return str(detector.detect())
    except LangDetectException:  # its only reason here: no letters
        return None


@lru_cache(maxsize=1)
def _factory() -> Any:
    """A factory of our own: the library's shared one is seeded for the whole process or not at all."""
    import langdetect
    from langdetect.detector_factory import DetectorFactory

    factory = DetectorFactory()
    factory.load_profile(str(Path(langdetect.__file__).parent / "profiles"))
    factory.seed = 0
    return factory
