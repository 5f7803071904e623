"""The number that an answer ends in, the letter that it chooses, and answers that must be the reference."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal

import pytest

from benchmarks.build_mmlu_suite import row
from resafe.eval import load_suite
from resafe.eval.checks import choice, chosen, exact, exact_number, last_number, unfit


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48 / 2 = 24, and 48 + 24 = 72.\n#### 72", "72"),
        ("The answer is $1,000.", "1000"),
        ("The answer is 3 x 4 = 12. Ask me 1 more.", "12"),
        ("So she has 5 - 3 = 2 apples", "2"),
        ("it fell to -4", "-4"),
        ("from 10-3", "3"),
        ("Answer: 0.50", "0.50"),
        ("I say 7. The answer is unknown to me.", "7"),
        ("#### 18\nThe 2 of us agree", "18"),
    ],
)
def test_the_conclusion_is_read(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


def test_without_numbers_there_is_none() -> None:
    assert last_number("none at all") is None


def test_equal_numbers_may_be_written_differently() -> None:
    assert exact_number("That makes $72.00.", "... #### 72") and not exact_number("72 or 73", "#### 72")


def test_no_number_is_never_right() -> None:
    assert not exact_number("I do not know", "no reference either")


def test_every_shipped_reference_has_a_number_and_solves_itself() -> None:
    cases = load_suite("gsm8k").cases
    assert len(cases) == 300 and all(exact_number(c.reference, c.reference) for c in cases)


@pytest.mark.parametrize(
    "text",
    [
        "B", " B\n", "B.", "(B)", "[B]", "**B**", "`B`", "B) cats", "B: cats", "(B) cats and dogs", "B, because cats purr",
        "B is correct", "B because cats purr", "Option B.", "Choice (B)", "B\n\nCats purr. The answer is clear.",
        "The answer is B", "The correct answer is (B).", "the answer is: **B**, since cats purr", "ANSWER IS B", "Answer: B",
        "**Answer:** B", "Answer: option B", "The answer is 'B'.", "The answer is $\\boxed{B}$.", "\\boxed{B}",
        "A looks right.\nAnswer: A\nNo, the answer is B", "A. cats\nB. dogs\nThe answer is B.", "Cats purr, so the answer is B.",
        "The answer is B. Answer: the cat",
    ],
)  # fmt: skip
def test_the_chosen_letter_is_read(text: str) -> None:
    assert chosen(text) == "B"
    assert choice(text, "B") and choice(text, " B ") and not choice(text, "A")


@pytest.mark.parametrize(
    "text",
    [
        "", "b", "cats", "A cat purrs", "I think it is B", "Answer: A cat purrs", "The answer is A cat", "The answer is not B",
        "B or C", "B, C", "B) and (C)", "The answer is B or C", "The answer is B, C", "A-level", "A's", "Bob", "AB",
        "A. cats\nB. dogs\nC. cows\nD. hens", "It is either. A", "I", "The answer is I.",
    ],
)  # fmt: skip
def test_an_answer_that_is_not_one_letter_chooses_none(text: str) -> None:
    assert chosen(text) == ""


def test_every_letter_is_read_by_the_same_rules() -> None:
    forms = ("{}", "({}) so", "{} cat", "The answer is {} cat", "Answer: {}", "{} because", "the answer is {} as", "{}'s")
    assert len({tuple(chosen(form.format(letter)) == letter for form in forms) for letter in "ABCDEFGH"}) == 1


def test_a_long_answer_of_white_space_or_letters_is_read_in_time() -> None:
    assert chosen(" " * 200_000) == chosen("*" * 200_000) == chosen("answer is " * 20_000) == ""


@pytest.mark.parametrize(
    "text",
    [
        "SELECT a FROM b", " SELECT  a\nFROM b ", "SELECT a FROM b;", "SELECT a FROM b .", "```sql\nSELECT a\n  FROM b;\n```",
        "```\nSELECT a FROM b\n```\n", "SELECT a FROM b ;\n",
    ],
)  # fmt: skip
def test_the_whole_answer_must_be_the_reference_but_for_its_layout(text: str) -> None:
    assert exact(text, "SELECT a FROM b") and exact("SELECT a FROM b", text)


@pytest.mark.parametrize(
    "text", ["select a FROM b", "SELECT a FROM b, c", "Here: SELECT a FROM b", "SELECT 'a' FROM b", "", "```\nSELECT a FROM b\n``` ok"]
)
def test_another_answer_is_not_the_reference(text: str) -> None:
    assert not exact(text, "SELECT a FROM b")


@pytest.mark.parametrize(
    ("check", "reference", "said"),
    [
        ("choice", "", "its reference must be one letter from A to H, not ''"),
        ("choice", "2", "not '2'"),
        ("choice", "AB", "not 'AB'"),
        ("exact", " ;", "it has no reference"),
        ("ifeval", "", "'instruction_id_list' and 'kwargs' must be lists"),
        ("choice", "H", ""),
        ("exact", "a", ""),
        ("none", "", ""),
        ("lab", "", ""),
    ],
)
def test_a_row_without_what_its_check_needs_is_unfit(check: str, reference: str, said: str) -> None:
    assert said in unfit(check, reference, {}) and bool(unfit(check, reference, {})) == bool(said)


def test_the_mmlu_questions_are_five_of_each_subject_with_four_options_and_a_letter() -> None:
    cases = load_suite("mmlu").cases
    assert set(Counter(c.category for c in cases).values()) == {5} and len(cases) == 285
    for case in cases:
        prompt = case.messages[0]["content"]
        places = [prompt.index(f"\n{letter}. ") for letter in "ABCD"]
        assert places == sorted(places) and prompt.endswith("Answer with the letter of the right option only.")
        assert choice(f"({case.reference})", case.reference)


def test_a_question_is_put_with_its_options_by_letter() -> None:
    line = {"question": " What? ", "choice0": "no", "choice1": "yes", "choice2": "one", "choice3": "two", "answer": "1"}
    found = row("some_subject", 4, line)
    assert found["prompt"].startswith("What?\n\nA. no\nB. yes\nC. one\nD. two\n\nAnswer")
    assert (found["id"], found["answer"]) == ("some_subject/4", "B")
