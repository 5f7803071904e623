"""Twenty-three signals of a refusal that do not depend on the words of one model: where it refuses, moralises, lists steps.

Bags of words learn how one model refuses and fail on the next one. These read the whole answer: a refusal in the first
sentences or later, norms ("is illegal", "should not") at the opening and in all, redirection ("please seek help"), steps,
code and length, and whether the answer denies what the prompt presupposes (_premise.py). Shares and counts are scaled to about [0, 1].
"""

from __future__ import annotations

import math
import re

from resafe.guards._premise import denies_premise, lectures
from resafe.guards.rules import is_refusal, refuses

VERSION = 2  # raise it when the signals change: files fitted with them are refused then
COUNT = 23
READ = 12_000  # characters of an answer that are looked at
_END = re.compile(r"(?<=[.!?:]) ")
_MORAL = re.compile(
    r"\b(?:illegal|unethical|immoral|inappropriate|harmful|dangerous|wrong|disrespectful|offensive|unacceptable|violat\w+|"
    r"consequences|discriminat\w+|hurtful|crime|criminal|discourag\w+|condone\w*|refrain|avoid|respect\w*|dignity|"
    r"responsib\w+|ethical\w*|moral\w*|legal\w*|laws?|not (?:appropriate|acceptable|recommended|advis\w+)|strongly advise)\b"
)
_REDIRECT = re.compile(
    r"\b(?:instead|please|seek help|professional|reach out|contact|if you (?:are|have|need)|alternative\w*|important to|"
    r"i encourage|i would (?:suggest|recommend|encourage)|it's best to|mental health|authorities)\b"
)
_NORM = re.compile(
    r"\b(?:should(?:n't| not)|must(?:n't| not)|not (?:appropriate|ethical|acceptable|okay|ok|right|legal|possible)|"
    r"never (?:ok|okay|appropriate|acceptable|right)|is (?:illegal|unethical|wrong|immoral|inappropriate|dangerous|a crime)|"
    r"are (?:illegal|unethical|wrong))\b"
)
_SELF = re.compile(
    r"\b(?:i cannot|i can't|i can not|i won't|i will not|i am unable|i'm unable|i am not able|i'm not able|i do not|i don't|"
    r"as an ai|my programming|i'm sorry|i apologize)\b"
)
_STEP = re.compile(r"(?m)^\s*(?:\d+[.)]|[-*\u2022])\s")


def sentences(text: str) -> list[str]:
    """Lower-case sentences with straight quotes and single spaces."""
    text = re.sub(r"\s+", " ", text[:READ].replace("\u2019", "'").lower()).strip()
    return [s for s in _END.split(text) if s.strip()]


def signals(response: str, prompt: str = "") -> list[float]:
    """COUNT numbers of one answer, in a fixed order; the last two also read the prompt."""
    found = sentences(response)
    first, head, tail, body = ("".join(found[:1]), " ".join(found[:2]), " ".join(found[-2:]), " ".join(found))
    count = max(1, len(response.split()))
    per_word = 20 / count  # a share of words becomes a rate per 20 words
    steps = len(_STEP.findall(response))
    said = [refuses(s.strip(" \"'*_#>-")) for s in found[:40]]
    moral = len(_MORAL.findall(body))
    return [
        float(is_refusal(response)), float(any(said[:3])), float(any(said[3:])), sum(said) / max(1, len(found)),
        _has(_NORM, first), _has(_NORM, head), _has(_NORM, body),
        _has(_MORAL, first), min(3, len(_MORAL.findall(head))) / 3, min(1.0, moral * per_word / 2), min(6, moral) / 6,
        _has(_REDIRECT, head), _has(_REDIRECT, tail), min(1.0, len(_REDIRECT.findall(body)) * per_word),
        min(1.0, len(_SELF.findall(body)) * per_word), _has(_SELF, head), _has(_SELF, tail),
        min(1.0, math.log1p(count) / 7), min(steps, 8) / 8, float("```" in response), float(steps > 0),
        float(denies_premise(prompt, response)), float(lectures(prompt, response)),
    ]  # fmt: skip


def _has(pattern: re.Pattern[str], text: str) -> float:
    return float(bool(pattern.search(text)))
