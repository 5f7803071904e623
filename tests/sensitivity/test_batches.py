"""Which positions count."""

from __future__ import annotations

from pathlib import Path

import pytest

from resafe import chat
from resafe.errors import ResafeError
from resafe.models import load_tokenizer
from resafe.sensitivity import answers, prompts
from tests.sensitivity.rows import ROWS as ALL

ROWS = ALL[:2]


def test_a_position_counts_where_it_predicts_a_token_of_the_answer(aligned: Path) -> None:
    tokenizer = load_tokenizer(aligned)
    (batch,) = answers(tokenizer, ROWS)
    for i, r in enumerate(ROWS):
        encoded = chat.encode(tokenizer, r["messages"])
        predicted = [int(t) for t in batch.ids[i, 1:][batch.counts[i, :-1]]]
        assert predicted == [t for t, a in zip(encoded.ids, encoded.assistant) if a]
        asked = chat.prompt_ids(tokenizer, r["messages"][:-1])
        assert batch.counts[i].tolist().index(True) == len(asked) - 1, "the first that counts is the last token of the question"
    assert not batch.counts[batch.attention == 0].any(), "padding never counts"


def test_single_rows_are_the_batch_without_its_padding(aligned: Path) -> None:
    tokenizer = load_tokenizer(aligned)
    (batch,) = answers(tokenizer, ROWS)
    singles = answers(tokenizer, ROWS, size=1)
    assert len(singles) == 2 and batch.ids.shape[1] > min(s.ids.shape[1] for s in singles)
    for cut, alone in zip(batch.rows(), singles):
        assert cut.ids.equal(alone.ids) and cut.counts.equal(alone.counts) and bool(alone.attention.all())


def test_only_the_last_token_of_a_prompt_counts(aligned: Path) -> None:
    tokenizer = load_tokenizer(aligned)
    (batch,) = prompts(tokenizer, [r["messages"][:-1] for r in ROWS])
    assert batch.counts.sum(1).tolist() == [1, 1]
    assert [int(c.int().argmax()) + 1 for c in batch.counts] == batch.attention.sum(1).tolist()


def test_rows_whose_answers_are_cut_off_are_refused(aligned: Path) -> None:
    with pytest.raises(ResafeError, match="none of 2 rows has an answer within 3 tokens"):
        answers(load_tokenizer(aligned), ROWS, max_length=3)
    with pytest.raises(ResafeError, match="no prompts"):
        prompts(load_tokenizer(aligned), [])
