"""The simple way to a model's answers: in order, cut to fit the context, told of progress."""

from __future__ import annotations

from pathlib import Path

import pytest

from resafe.generate import end_tokens, fitted, generate
from resafe.models import load

ASKED = [[{"role": "user", "content": f"what is the opposite of {w} ?"}] for w in ("hot", "up", "big", "wet", "hot")]


def test_answers_keep_the_order_asked_and_equal_prompts_get_equal_answers(aligned: Path) -> None:
    texts = [a.text for a in generate(load(aligned), ASKED, 20, batch_size=2)]
    assert texts[0] == texts[4] == "cold ." and len(set(texts)) == 4


def test_no_conversations_give_no_answers(aligned: Path) -> None:
    assert generate(load(aligned), []) == []


def test_progress_adds_up_and_is_told_about_once_in_a_batch(aligned: Path) -> None:
    told: list[int] = []
    generate(load(aligned), ASKED, 20, batch_size=2, progress=told.append)
    assert told == [2, 2, 1]


def test_an_answer_is_counted_without_the_token_that_ends_it(aligned: Path) -> None:
    loaded = load(aligned)
    (whole,), (cut,) = generate(loaded, ASKED[:1], 20), generate(loaded, ASKED[:1], 1)
    assert (whole.text, whole.tokens, whole.finished) == ("cold .", 2, True)
    assert (cut.text, cut.tokens, cut.finished) == ("cold", 1, False)


def test_further_end_tokens_of_the_generation_config_end_an_answer(aligned: Path) -> None:
    loaded = load(aligned)
    dot = loaded.tokenizer.convert_tokens_to_ids(loaded.tokenizer.tokenize(" ."))[0]
    loaded.model.generation_config.eos_token_id = [loaded.tokenizer.eos_token_id, dot]
    assert dot in end_tokens(loaded)
    assert [(a.text, a.finished) for a in generate(loaded, ASKED[:1], 20)] == [("cold", True)]


def test_after_an_assistant_turn_a_new_one_begins(aligned: Path) -> None:
    """Guard models judge an exchange: its last turn must not be continued."""
    loaded = load(aligned)
    exchange = [*ASKED[0], {"role": "assistant", "content": "cold"}]
    (new,) = generate(loaded, [exchange], 20)
    assert new.text != "."


@pytest.mark.parametrize(
    ("length", "limit", "context", "kept", "left"),
    [
        (10, 20, 256, 10, 20),  # room enough
        (300, 56, 256, 200, 56),  # cut on the left
        (300, 200, 256, 128, 128),  # half the context is the prompt's
        (20, 512, 256, 20, 236),  # a limit beyond the context ends where it ends
        (300, 512, 256, 128, 128),
    ],
)
def test_a_prompt_and_its_limit_fit_the_context(length: int, limit: int, context: int, kept: int, left: int) -> None:
    ids = list(range(length))
    job = fitted(ids, limit, context)
    assert (job.ids, job.max_new_tokens) == (ids[length - kept :], left)


def test_a_limit_beyond_the_context_is_answered_within_it(aligned: Path) -> None:
    (answer,) = generate(load(aligned), ASKED[:1], 5000)
    assert answer.text == "cold ."
