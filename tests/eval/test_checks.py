"""The number that an answer ends in."""

from __future__ import annotations

from decimal import Decimal

import pytest

from resafe.eval import load_suite
from resafe.eval.checks import exact_number, last_number


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
