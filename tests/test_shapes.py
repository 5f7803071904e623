"""Every shape of a row: recognised, read as a conversation, and written back as it was."""

from __future__ import annotations

from typing import Any

import pytest

from resafe.errors import ResafeError
from resafe.preferences import COMPLIANT_OPENING, with_rejected
from resafe.rows import chat
from resafe.shapes import marked, read, shape_of, write

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
EXAMPLES: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ASSISTANT]},
    "conversations": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "texts": {"prompt": "q", "completion": "a"},
    "turns": {"prompt": [USER], "completion": [ASSISTANT]},
    "alpaca": {"instruction": "q", "output": "a", "input": ""},
    "alpaca without input": {"instruction": "q", "output": "a"},
    "question": {"question": "q", "answer": "a"},
}
PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "turns": {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "b"}]},
    "implicit": {"chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "b"}]},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_row_comes_back_as_it_was(name: str) -> None:
    example = EXAMPLES[name]
    shape = shape_of({**example, "id": 7, "nothing": None})
    assert shape is not None and not shape.preference
    assert read(example, shape) == chat("q", "a")
    assert write(chat("q", "a"), shape) == example


@pytest.mark.parametrize("name", PAIRS)
def test_a_preference_row_comes_back_as_it_was(name: str) -> None:
    shape = shape_of(PAIRS[name])
    assert shape is not None and shape.preference
    row = read(PAIRS[name], shape)
    assert row == {**chat("q", "a"), "rejected": "b"}
    assert write(row, shape) == PAIRS[name]


def test_text_is_rendered_and_refused_without_a_template() -> None:
    shape = shape_of({"text": "once"})
    assert shape is not None
    assert write(chat("q", "a"), shape, lambda m, _: f"{m[0]['content']}|{m[1]['content']}") == {"text": "q|a"}
    with pytest.raises(ResafeError, match="--tokenizer"):
        write(chat("q", "a"), shape)


def test_columns_of_no_shape_are_not_guessed() -> None:
    assert shape_of({"input_ids": [1], "labels": [1]}) is None
    assert shape_of({"text": None, "messages": None}) is None


def test_a_system_message_goes_in_front_where_there_is_one_text_and_several_turns_are_refused() -> None:
    shape = shape_of({"prompt": "q", "completion": "a"})
    assert shape is not None
    system = {"role": "system", "content": "be kind"}
    assert write({"messages": [system, USER, ASSISTANT]}, shape) == {"prompt": "be kind\n\nq", "completion": "a"}
    with pytest.raises(ResafeError, match="several turns"):
        write({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, shape)


def test_alpacas_input_is_part_of_the_question() -> None:
    example = {"instruction": "add", "input": "2 3", "output": "5"}
    shape = shape_of(example)
    assert shape is not None and read(example, shape) == chat("add\n\n2 3", "5")


def test_parts_of_a_message_are_read_as_their_text() -> None:
    example = {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASSISTANT]}
    shape = shape_of(example)
    assert shape is not None and read(example, shape) == chat("q", "a")


def test_what_is_rejected_for_a_safety_row() -> None:
    refusal = chat("bad", "no")
    assert with_rejected(refusal, [refusal])["rejected"] == COMPLIANT_OPENING
    assert with_rejected({**refusal, "rejected": "mine"}, [])["rejected"] == "mine"
    assert with_rejected(chat("kill a process", "use kill", kind="contrast"), [refusal])["rejected"] == "no", "a contrast row rejects refusing"


def test_a_prompt_and_an_answer_in_the_marks_of_a_template() -> None:
    def render(messages: Any, opened: bool) -> str:
        return "".join(f"<|{m['role']}|>{m['content']}" for m in messages) + "<|assistant|>" * opened

    shape = shape_of({"prompt": "<|user|>x<|assistant|>", "completion": "y"})
    assert shape is not None
    assert write(chat("q", "a"), shape, render) == {"prompt": "<|user|>q<|assistant|>", "completion": "a"}
    assert marked(["x", "<|im_start|>user"]) and marked(["[INST] x"]) and marked(["<start_of_turn>user"]) and not marked(["a <b> | c", "x[0]"])
