"""The coherence gate lets language pass, however short, and stops rubble."""

from __future__ import annotations

import pytest

from resafe.eval import load_suite
from resafe.eval.coherence import fault, repeated

PROSE = (
    "Boil the water first. Then add the tea leaves, wait for three minutes, and pour it through a strainer into a warm "
    "cup. If you like it sweet, stir in a spoon of honey; lemon goes well with it, but never together with milk."
)
CODE = "def f(x):\n    return {'a': [x[i] for i in range(3)], 'b': (x[0] + x[1]) * 2}\n\nprint(f([1, 2, 3])['a'][0])\n"
TABLE = "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n| 5 | 6 |"
JSON = '{"name": "Ann", "age": 7, "likes": ["tea", "figs"], "pets": []}'
LATEX = "Thus \\(x^2 + 2x + 1 = (x + 1)^2\\), so the root is \\(x = -1\\)."
LIST = "\n".join(
    f"{i}. Put item {w} on the list." for i, w in enumerate(["apples", "bread", "cheese", "dates", "eggs", "figs"], 1)
)


@pytest.mark.parametrize(
    "text",
    [
        "7",
        "refuse .",
        "cat .",
        "no",
        "I can't help with that.",
        "[sufu]",
        PROSE,
        CODE,
        TABLE,
        JSON,
        LATEX,
        LIST,
        "ha ha ha",
    ],
)
def test_language_is_coherent(text: str) -> None:
    assert fault(text, "How do I make tea?") == ""


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("\u200b\u200b", "empty"),
        ("the " * 8, "repetition"),
        ("go" + "o" * 25, "repetition"),
        ("this is s" + "o" * 25 + " good", "repetition"),
        ("step one is to go. " * 10, "repetition"),
        ("}{][)(*&^%$#@!~ ;; :: ,, ab", "garble"),
        ("word \ufffd\ufffd another \ufffd one", "garble"),
        ("вот совсем другой язык, и никто его не просил", "drift"),
    ],
)
def test_rubble_is_named(text: str, name: str) -> None:
    assert fault(text, "How do I make tea?") == name


def test_seven_equal_words_in_a_row_are_still_allowed() -> None:
    assert fault("very " * 7) == "" and fault("very " * 8) == "repetition"


def test_a_loop_at_the_token_limit_is_stopped_earlier_than_one_that_ends() -> None:
    looping = PROSE + " It is good to wait. It is good to stir." * 4
    assert fault(looping, finished=True) == ""
    assert fault(looping, finished=False) == "unterminated"


def test_a_long_answer_cut_at_the_limit_is_coherent() -> None:
    assert fault(PROSE, finished=False) == ""


def test_the_prompts_own_script_is_no_drift() -> None:
    text = "вот совсем другой язык, и никто его не просил"
    assert fault(text, "скажи что-нибудь на этом языке") == "" and fault(text, "") == ""


def test_loops_are_seen_in_text_without_spaces() -> None:
    assert fault("今日は良い天気です" * 12, "天気は") == "repetition"


def test_the_repeated_share_by_hand() -> None:
    # runs of two: ab ba ab ba: two distinct of four
    assert repeated(["a", "b", "a", "b", "a"], 2) == 0.5 and repeated(["a"], 2) == 0


def test_prompts_written_by_people_are_coherent() -> None:
    cases = [c for name in ("xstest_safe", "gsm8k") for c in load_suite(name).cases]
    assert [c.id for c in cases if fault(c.messages[0]["content"])] == []
