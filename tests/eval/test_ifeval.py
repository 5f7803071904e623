"""IFEval's instructions are checked as published; expected verdicts are worked out by hand or are the published code's."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.ifeval_agreement import table
from resafe.eval import ifeval, load_suite
from resafe.eval.ifeval import follow, unfit, versions
from resafe.eval.ifeval.checkers import CHECKERS
from resafe.eval.ifeval.text import _factory, capital_words, language, sentences, words
from resafe.eval.judges import get_judge
from resafe.generate import Answer

ENGLISH = "the old garden lies near the river and children play there in the summer"
GERMAN = "Der Garten liegt am Fluss und die Kinder spielen dort jeden Sommer bis zum Abend"
CASES: list[tuple[str, dict[str, Any], str, str]] = [  # instruction, kwargs, followed by, broken by
    ("keywords:existence", {"keywords": ["sea", "sun"]}, "Sunny days at SEA", "the sun"),
    ("keywords:existence", {"keywords": ["a.c"]}, "a.c", "abc"),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "at least"}, "sea, Seaside", "one sea"),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "less than"}, "one sea", "sea, Seaside"),
    ("keywords:forbidden_words", {"forbidden_words": ["sea", "sun"]}, "seaside", "the Sun"),
    ("keywords:letter_frequency", {"letter": "a", "let_frequency": 2, "let_relation": "at least"}, "A cat", "cat"),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "at least"}, "##", "#"),
    ("language:response_language", {"language": "de"}, GERMAN, ENGLISH),
    ("language:response_language", {"language": "hi"}, "बगीचा नदी के पास है", GERMAN),
    ("language:response_language", {"language": "de"}, "12 + 30", ENGLISH),  # no letters: any language
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"}, "One. Two.", "One. Two! Three?"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two-three", "one two"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\none\n***\ntwo\n***", "one\n***\n\n***\ntwo"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 1}, "one\n\ntwo", "one *** two"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Sea"}, "one\n\n\"sea, two", "one\n\nseaside",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "sea"}, "Sea\n\ntwo", "sea\n\ntwo\n\nthree",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b c]", "[a and b]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "one\np. s. two", "one\nPS two"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "one\nP.P.S two", "one\nP.S. two"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n  - two", "* one\n** two\n3. three"),
    ("detectable_format:constrained_response", {}, "Well: My answer is no.", "my answer is no."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* **b c**", "*a* ** **"),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2}, "Day 1 x Day2", "Day 1 x Day"),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<a poem>>\none", "<< >>\none"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one******one"),
    ("combination:two_responses", {}, "******one******two", "one******two******three"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it. "}, " say it. Done", "I say it."),
    ("startend:end_checker", {"end_phrase": "The end."}, 'one "the end." ', "The end. Bye"),
    ("startend:quotation", {}, ' "one" ', '"one'),
    (
        "change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"},
        "NASA-ESA and U.S.", "NASA and Us",
    ),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH.capitalize()),
    ("change_case:english_capital", {}, ENGLISH.upper(), "САД НАХОДИТСЯ У РЕКИ"),
    ("change_case:english_lowercase", {}, ENGLISH, ENGLISH.capitalize()),
    ("punctuation:no_comma", {}, "one; two", "one, two"),
]  # fmt: skip


def row(*asked: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"instruction_id_list": [name for name, _ in asked], "kwargs": [kwargs for _, kwargs in asked]}


@pytest.mark.parametrize(("name", "kwargs", "good", "bad"), CASES)
def test_each_instruction_is_followed_or_broken(name: str, kwargs: dict[str, Any], good: str, bad: str) -> None:
    assert follow(good, row((name, kwargs))).strict
    assert not follow(bad, row((name, kwargs))).strict


def test_the_cases_above_the_checkers_and_the_published_rows_have_the_same_25_instructions() -> None:
    rows = [case.row for case in load_suite("ifeval").cases]
    published = {name for r in rows for name in r["instruction_id_list"]}
    assert set(CHECKERS) == published == {name for name, *_ in CASES} and len(published) == 25
    assert len(rows) == 541 and not any(map(unfit, rows))


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_a_blank_response_follows_nothing(text: str) -> None:
    found = follow(text, row(("punctuation:no_comma", {})))
    assert not found.strict and not found.loose


def test_a_prompt_is_followed_when_all_of_its_instructions_are() -> None:
    asked = row(("punctuation:no_comma", {}), ("startend:quotation", {}))
    assert follow('"one"', asked).each == ((True, True), (True, True))
    found = follow('"one, two"', asked)
    assert found.each == ((False, False), (True, True)) and not found.strict and not found.loose


@pytest.mark.parametrize(
    ("response", "loose"),
    [
        ('Sure, here:\n"one"', True),
        ('"one"\nBye', True),
        ('Sure:\n"one"\nBye', True),
        ('**"one"**', True),
        ('Sure:\n*"one"*\nBye', True),
        ('one\n"two" three\nfour', False),
    ],
)
def test_loosely_an_opening_a_closing_and_asterisks_do_not_count(response: str, loose: bool) -> None:
    found = follow(response, row(("startend:quotation", {})))
    assert (found.strict, found.loose) == (False, loose)


def test_the_loose_versions_are_the_papers_eight() -> None:
    assert versions("a\n*b*\nc") == ["a\n*b*\nc", "*b*\nc", "a\n*b*", "*b*", "a\nb\nc", "b\nc", "a\nb", "b"]


def test_without_language_detection_such_a_prompt_is_unscored_even_if_it_is_broken_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ifeval, "has_language_detection", lambda: False)
    found = follow("one, two", row(("punctuation:no_comma", {}), ("change_case:english_lowercase", {})))
    assert found.unscored == "language detection is not installed: pip install 'resafe[ifeval]'"
    assert not found.strict and not found.loose and found.each == ()
    assert follow("one", row(("punctuation:no_comma", {}))).strict


def test_the_judge_says_correct_strictly_and_keeps_the_reason_for_saying_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_suite("ifeval")
    comma = next(c for c in loaded.cases if c.row["instruction_id_list"] == ["punctuation:no_comma"])
    english = next(c for c in loaded.cases if c.row["instruction_id_list"] == ["change_case:english_lowercase"])
    answers = [Answer(text, 3, True) for text in ("one two", "one, two\nthree", "Not lower case")]
    judge = get_judge("ifeval")
    assert [v.correct for v in judge(loaded.suite, [comma, comma, english], answers)] == [True, False, False]
    monkeypatch.setattr(ifeval, "has_language_detection", lambda: False)
    (found,) = judge(loaded.suite, [english], answers[2:])
    assert found.correct is None and "resafe[ifeval]" in found.unscored


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", 0),
        ("no mark at all", 1),
        ("One. Two! Three? Four", 4),
        ("Dr. Who and J. R. Smith met Mrs. Dee at 3.5 p.m. in the U.S. last May.", 1),
        ("I like tea, cake, etc. The rest is fine.", 2),
        ("See e.g. No. 5 and p. 7.", 1),
        ("No. I do not.", 2),
        ("It ends... and goes on... Then it ends.", 2),
        ('He said "stop." Then he left. (He was late.) So was I.', 4),
        ("**Bold.** And plain.", 2),
        ("Wait?! What?", 2),
        ("Plan A. Then plan B.", 1),
        ("Ask me. i do not mind", 2),
        ("Visit example.com or a.b.c today.", 1),
    ],
)
def test_sentences_are_counted(text: str, number: int) -> None:
    assert sentences(text) == number


def test_long_unbroken_text_is_counted_in_time() -> None:
    assert sentences("a" * 200_000 + "." * 200_000) == 1


def test_words_are_runs_of_letters_digits_and_underscores() -> None:
    assert words("It's 3.5 well-known snake_case, and 中文!") == 9


@pytest.mark.parametrize(
    ("text", "number"),
    [("NASA and ESA, too", 2), ("WELL-KNOWN", 1), ("DON'T", 2), ("I'm", 1), ("U.S.", 1), ("YES--NO", 2), ("B2B 42 a", 1)],
)
def test_words_in_capitals_are_counted(text: str, number: int) -> None:
    assert capital_words(text) == number


def test_a_language_is_detected_the_same_each_time_without_seeding_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from langdetect import DetectorFactory

    monkeypatch.setattr(DetectorFactory, "seed", None)
    _factory.cache_clear()
    assert len({language("fiume jardin giardino jardin") for _ in range(30)}) == 1  # unseeded: five languages
    assert (language(GERMAN), language("12 + 30")) == ("de", None) and DetectorFactory.seed is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"instruction_id_list": ["punctuation:no_coma"]}, "no instruction 'punctuation:no_coma'. Did you mean 'punctuation:no_comma'"),
        ({"kwargs": []}, "must be lists of the same length"),
        ({"kwargs": None}, "must be lists of the same length"),
        ({"instruction_id_list": [], "kwargs": []}, "must be lists of the same length"),
        ({"instruction_id_list": ["startend:end_checker"]}, "startend:end_checker needs 'end_phrase' (str)"),
        ({"instruction_id_list": ["startend:end_checker"], "kwargs": [None]}, "needs 'end_phrase'"),
        (row(("length_constraints:number_words", {"num_words": True, "relation": "at least"})), "needs 'num_words' (int)"),
        (row(("length_constraints:number_words", {"num_words": 3, "relation": "most"})), "is 'most', not one of at least, less than"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_checked_is_told_why(changes: dict[str, Any], said: str) -> None:
    assert said in unfit({**row(("punctuation:no_comma", {})), **changes})


def test_empty_columns_of_other_instructions_do_no_harm() -> None:
    kwargs = {"num_words": None, "relation": None, "end_phrase": "Bye."}
    assert not unfit(row(("startend:end_checker", kwargs)))
    assert follow("Bye.", row(("startend:end_checker", kwargs))).strict


def test_verdicts_are_those_of_the_published_code_on_both_sides_of_every_instruction() -> None:
    found = table([], 3)
    assert set(found) == set(CHECKERS)
    assert all(0 < r["followed"] < r["n"] for r in found.values())
    differs = {name: r["keys"] for name, r in found.items() if r["strict_differs"] or r["loose_differs"]}
    assert set(differs) <= {"keywords:letter_frequency"}
    assert set(differs.get("keywords:letter_frequency", [])) <= {1122, 1129}
