"""The 25 instructions of IFEval and how each is checked: Zhou et al. 2023, https://arxiv.org/abs/2311.07911, table 1.

Each function says whether a text follows one instruction; its other parameters are the instruction's `kwargs` in the
published rows, by the same names. The verdicts are those of the published checkers
(google-research/instruction_following_eval), which read some instructions loosely: a postscript may stand anywhere, an
option or a title too, keywords count inside longer words, and a text whose language cannot be told is in any language.
One differs on purpose: `letter_frequency` counts the character asked for also where it is not a letter (rows 1122 and
1129 ask for '#' and '!'); the published one draws a random letter there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from resafe.eval.ifeval import text as count

RELATIONS = ("at least", "less than")
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}


def related(found: int, relation: str, number: int) -> bool:
    return found < number if relation == "less than" else found >= number


def existence(text: str, keywords: list[str]) -> bool:
    return all(re.search(re.escape(k), text, re.IGNORECASE) for k in keywords)


def frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return related(len(re.findall(re.escape(keyword.strip()), text, re.IGNORECASE)), relation, frequency)


def forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return related(text.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(text: str, language: str) -> bool:
    return count.language(text) in (language, None)


def number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return related(count.sentences(text), relation, num_sentences)


def number_words(text: str, num_words: int, relation: str) -> bool:
    return related(count.words(text), relation, num_words)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs stand between the dividers ***; only the first and the last may be blank, and are not counted then."""
    filled = [bool(part.strip()) for part in re.split(r"\s?\*\*\*\s?", text)]
    return all(filled[1:-1]) and sum(filled) == num_paragraphs


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs stand between blank lines; `nth_paragraph` counts from 1, blank ones included, as published."""
    parts = text.split("\n\n")
    filled = sum(bool(part.strip()) for part in parts)
    if nth_paragraph > filled or not parts[nth_paragraph - 1].strip():
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return filled == num_paragraphs and re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def number_placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    return bool(re.search(POSTSCRIPTS.get(marker, re.escape(marker.lower())), text.lower()))


def number_bullet_lists(text: str, num_bullets: int) -> bool:
    """Lines that begin with one asterisk or with a dash. White space before may reach over lines, as published."""
    stars = re.findall(r"^\s*\*[^*].*$", text, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", text, re.MULTILINE)) == num_bullets


def constrained_response(text: str) -> bool:
    return any(option in text for option in OPTIONS)


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """Texts between single and between double asterisks are counted apart: two adjacent bold ones are also a third."""
    single = [part.strip("*") for part in re.findall(r"\*[^\n*]*\*", text)]
    double = re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(part.strip()) for part in single + double) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def json_format(text: str) -> bool:
    body = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        body = body.removeprefix(fence)
    try:
        json.loads(body.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def title(text: str) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))


def two_responses(text: str) -> bool:
    """Two different answers with ****** between them; blank ones may stand only at the edges."""
    parts = [part.strip() for part in text.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    return len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"'


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return related(count.capital_words(text), capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    return text.isupper() and response_language(text, "en")


def english_lowercase(text: str) -> bool:
    return text.islower() and response_language(text, "en")


def no_comma(text: str) -> bool:
    return "," not in text


class Checker(NamedTuple):
    """`follows(text, **kwargs)`, the kwargs it needs with their types, and whether it needs language detection."""

    follows: Callable[..., bool]
    needs: Mapping[str, type] = MappingProxyType({})
    language: bool = False


CHECKERS = {
    "keywords:existence": Checker(existence, {"keywords": list}),
    "keywords:frequency": Checker(frequency, {"keyword": str, "frequency": int, "relation": str}),
    "keywords:forbidden_words": Checker(forbidden_words, {"forbidden_words": list}),
    "keywords:letter_frequency": Checker(letter_frequency, {"letter": str, "let_frequency": int, "let_relation": str}),
    "language:response_language": Checker(response_language, {"language": str}, language=True),
    "length_constraints:number_sentences": Checker(number_sentences, {"num_sentences": int, "relation": str}),
    "length_constraints:number_paragraphs": Checker(number_paragraphs, {"num_paragraphs": int}),
    "length_constraints:number_words": Checker(number_words, {"num_words": int, "relation": str}),
    "length_constraints:nth_paragraph_first_word": Checker(
        nth_paragraph_first_word, {"num_paragraphs": int, "nth_paragraph": int, "first_word": str}
    ),
    "detectable_content:number_placeholders": Checker(number_placeholders, {"num_placeholders": int}),
    "detectable_content:postscript": Checker(postscript, {"postscript_marker": str}),
    "detectable_format:number_bullet_lists": Checker(number_bullet_lists, {"num_bullets": int}),
    "detectable_format:constrained_response": Checker(constrained_response),
    "detectable_format:number_highlighted_sections": Checker(number_highlighted_sections, {"num_highlights": int}),
    "detectable_format:multiple_sections": Checker(multiple_sections, {"section_spliter": str, "num_sections": int}),
    "detectable_format:json_format": Checker(json_format),
    "detectable_format:title": Checker(title),
    "combination:two_responses": Checker(two_responses),
    "combination:repeat_prompt": Checker(repeat_prompt, {"prompt_to_repeat": str}),
    "startend:end_checker": Checker(end_checker, {"end_phrase": str}),
    "startend:quotation": Checker(quotation),
    "change_case:capital_word_frequency": Checker(
        capital_word_frequency, {"capital_frequency": int, "capital_relation": str}
    ),
    "change_case:english_capital": Checker(english_capital, language=True),
    "change_case:english_lowercase": Checker(english_lowercase, language=True),
    "punctuation:no_comma": Checker(no_comma),
}
