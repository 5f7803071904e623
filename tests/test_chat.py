"""One template path: masks are right, with and without generation marks, and DPO sees the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resafe import chat
from resafe.errors import ResafeError
from resafe.models import load_tokenizer

TALK = [
    {"role": "system", "content": "be brief ."},
    {"role": "user", "content": "say kite in code ."},
    {"role": "assistant", "content": "sure ."},
    {"role": "user", "content": "what is the opposite of hot ?"},
    {"role": "assistant", "content": "cold ."},
]


@pytest.fixture
def tokenizer(aligned: Path) -> Any:
    return load_tokenizer(aligned)


def written(tokenizer: Any, encoded: chat.Encoded) -> str:
    return str(tokenizer.decode([t for t, m in zip(encoded.ids, encoded.assistant) if m]))


def test_the_mask_covers_what_the_assistant_wrote_and_its_end(tokenizer: Any) -> None:
    assert written(tokenizer, chat.encode(tokenizer, TALK)) == " sure .<|end|> cold .<|end|>"


def test_a_template_without_marks_gives_the_same_mask(tokenizer: Any) -> None:
    marked = chat.encode(tokenizer, TALK)
    tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert chat.encode(tokenizer, TALK) == marked


def test_the_prompt_is_a_prefix_of_the_conversation(tokenizer: Any) -> None:
    full, prompt = chat.encode(tokenizer, TALK), chat.prompt_ids(tokenizer, TALK[:-1])
    assert full.ids[: len(prompt)] == prompt
    assert not any(full.assistant[len(prompt) - 1 : len(prompt)]) and all(full.assistant[len(prompt) :])


def test_a_tokenizer_without_a_template_gets_the_plain_one(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    encoded = chat.encode(chat.prepare(tokenizer), TALK)
    assert written(tokenizer, encoded) == "sure .<|end|>cold .<|end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
    with pytest.raises(ResafeError, match="generation %} marks"):
        chat.encode(tokenizer, TALK)


def test_a_system_message_goes_into_the_first_user_turn_where_the_template_refuses_it(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + tokenizer.chat_template
    )
    text = tokenizer.decode(chat.encode(tokenizer, TALK).ids)
    assert "<|system|>" not in text and "be brief .\n\nsay kite in code ." in text


TURN = "{% for m in messages %}"
STYLES = {  # short forms of templates in use: header, words, end, and their oddities
    "lab": None,
    "plain": chat.PLAIN_TEMPLATE,
    "llama 3": "{{ bos_token }}" + TURN + "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "chatml": TURN + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "gemma": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURN
    + "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "llama 2": TURN + "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}",
    "thinking": TURN + "<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1].lstrip() }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
    "deaf": "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}answer: {% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_a_prefill_is_left_open_after_the_header(style: str, tokenizer: Any) -> None:
    tokenizer.chat_template = STYLES[style] or tokenizer.chat_template
    asked, words = TALK[:-1], "step one : cat doll"
    header = tokenizer.apply_chat_template(chat.foldable(tokenizer, asked), tokenize=False, add_generation_prompt=True)
    gap = " " if style in ("lab", "llama 2") else ""  # these put a space before the words
    ids = chat.prompt_ids(tokenizer, [*asked, {"role": "assistant", "content": words}])
    assert ids == tokenizer(header + gap + words, add_special_tokens=False)["input_ids"]


def test_the_prefill_is_the_beginning_of_the_whole_turn(tokenizer: Any) -> None:
    opened, whole = chat.prompt_ids(tokenizer, TALK), chat.encode(tokenizer, TALK).ids
    assert opened == whole[: len(opened)] and tokenizer.decode(whole[len(opened) :]) == "<|end|>"


def test_a_new_turn_after_an_assistant_turn_is_another_thing_than_a_prefill(tokenizer: Any) -> None:
    assert tokenizer.decode(chat.next_turn_ids(tokenizer, TALK)).endswith(" cold .<|end|><|assistant|>")
    assert chat.next_turn_ids(tokenizer, TALK[:-1]) == chat.prompt_ids(tokenizer, TALK[:-1])


def test_an_end_of_sequence_token_is_required(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ResafeError, match="end-of-sequence"):
        chat.prepare(tokenizer)
