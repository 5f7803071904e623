"""The one path from a conversation to token ids: training, preference pairs, judging and generation all come through here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resafe.errors import ResafeError
from resafe.files import digest
from resafe.rows import Message

# For tokenizers that bring no chat template (GPT-2, plain base models). Plain words, so that nothing must be added to the vocabulary.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}### Response:\n{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}\n"
    "{% elif m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% else %}### Instruction:\n{{ m['content'] }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation; `assistant[i]` is 1 where token i was written by the assistant (trained on)."""

    ids: list[int]
    assistant: list[int]


def prepare(tokenizer: Any) -> Any:
    """Make a freshly loaded tokenizer usable: a chat template and a padding token. Changes and returns `tokenizer`."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    if tokenizer.eos_token is None:
        raise ResafeError("the tokenizer has no end-of-sequence token: set eos_token in tokenizer_config.json.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def template_id(tokenizer: Any) -> str:
    """Short hash of the chat template; differing values mean that two numbers are not comparable."""
    return digest(str(tokenizer.chat_template))[:12]


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids up to where the assistant starts to write, or goes on: a last turn of its own is left open (a prefill)."""
    if messages and messages[-1]["role"] == "assistant":
        return list(tokenizer(_opened(tokenizer, messages), add_special_tokens=False)["input_ids"])
    return next_turn_ids(tokenizer, messages)


def next_turn_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids up to where the assistant starts a turn of its own, whoever spoke last."""
    return _render(tokenizer, messages, add_generation_prompt=True)


def _opened(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The conversation as text, ending in the words of its last turn.

    Templates decide on what stands between the header and the words, such as a space. But some drop or move words of a
    last turn (reasoning templates), or know no assistant turn at all: then the words follow the header at once.
    """
    words = messages[-1]["content"]
    header = str(_applied(tokenizer, messages[:-1], tokenize=False, add_generation_prompt=True))
    try:
        text = str(_applied(tokenizer, messages, tokenize=False, continue_final_message=True))
    except ValueError:  # transformers does not find the words again
        return header + words
    return text if text.startswith(header) and text[len(header) :].strip() == words.strip() else header + words


def encode(tokenizer: Any, messages: Sequence[Message]) -> Encoded:
    """A whole conversation and its assistant mask, by the template's generation marks or, without them, turn by turn.

    Raises ResafeError if the template is not prefix-stable (a turn's tokens depend on later turns).
    """
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        out = _applied(tokenizer, messages, return_dict=True, return_assistant_tokens_mask=True)
        return Encoded(list(out["input_ids"]), list(out["assistant_masks"]))
    return _by_turns(tokenizer, messages)


def _by_turns(tokenizer: Any, messages: Sequence[Message]) -> Encoded:
    full = _render(tokenizer, messages)
    mask = [0] * len(full)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _render(tokenizer, messages[:i], add_generation_prompt=True)
        end = _render(tokenizer, messages[: i + 1])
        if full[: len(start)] != start or full[: len(end)] != end:
            raise ResafeError(
                "this chat template renders a turn differently once later turns exist, so the assistant's tokens cannot be "
                "told apart: add {% generation %} marks to the template."
            )
        mask[len(start) : len(end)] = [1] * (len(end) - len(start))
    return Encoded(full, mask)


def _render(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
    return list(_applied(tokenizer, messages, return_dict=False, add_generation_prompt=add_generation_prompt))


def _applied(tokenizer: Any, messages: Sequence[Message], tokenize: bool = True, **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(foldable(tokenizer, messages), tokenize=tokenize, **options)
    except TemplateError as error:
        raise ResafeError(f"the model's chat template refuses a conversation: {error}") from None


def foldable(tokenizer: Any, messages: Sequence[Message]) -> list[Message]:
    """Put a system message in front of the first user message for templates that refuse the system role (Gemma)."""
    if not messages or messages[0]["role"] != "system" or "System role not supported" not in tokenizer.chat_template:
        return list(messages)
    head, first, *rest = messages
    return [{"role": "user", "content": f"{head['content']}\n\n{first['content']}"}, *rest]
