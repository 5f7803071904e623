"""The shapes that rows of data files and data sets come in: recognise one, read it as a conversation, write a conversation in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resafe.errors import ResafeError
from resafe.rows import Message, Row, prompt_of

Render = Callable[[Sequence[Message], bool], str]
MARKS = re.compile(r"<\|[\w ]+\|>|\[/?INST\]|<(start|end)_of_turn>|<\uff5c\w+\uff5c>")
FROM = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
TO = {"user": "human", "assistant": "gpt", "system": "system"}


@dataclass(frozen=True)
class Shape:
    """One shape: its name, the keys that make it, and whether its texts are lists of messages."""

    name: str
    keys: tuple[str, ...]
    chat: bool = False

    @property
    def preference(self) -> bool:
        """Whether a row holds a chosen and a rejected answer."""
        return "rejected" in self.keys


def shape_of(example: Mapping[str, Any]) -> Shape | None:
    """The shape of a row by its keys; None if it is not one of those known here."""
    present = {k for k, v in example.items() if v is not None}
    if {"chosen", "rejected"} <= present:
        keys = ("prompt", "chosen", "rejected") if "prompt" in present else ("chosen", "rejected")
        return Shape("preference", keys, isinstance(example["chosen"], list))
    if "messages" in present:
        return Shape("messages", ("messages",), True)
    if "conversations" in present and isinstance(example["conversations"], list):
        return Shape("conversations", ("conversations",), True)
    for keys in (("prompt", "completion"), ("instruction", "output"), ("question", "answer")):
        if set(keys) <= present:
            more = tuple(k for k in ("input",) if keys[0] == "instruction" and k in example)
            return Shape("+".join(keys), (*keys, *more), isinstance(example[keys[0]], list))
    if isinstance(example.get("text"), str):
        return Shape("text", ("text",))
    return None


def read(example: Mapping[str, Any], shape: Shape) -> Row:
    """A row of `shape` as `{"messages": ...}` (and `rejected`). Roles and turns are not judged here: trainers accept many.

    Raises ResafeError for a row without texts where texts belong.
    """
    if shape.preference:
        prompt = _turns(example["prompt"], "user") if example.get("prompt") else []
        chosen, rejected = (_turns(example[k], "assistant") for k in ("chosen", "rejected"))
        if not prompt:
            prompt, chosen, rejected = _common(chosen, rejected)
        return {"messages": [*prompt, *chosen], "rejected": rejected[-1]["content"] if rejected else ""}
    if shape.name in ("messages", "conversations"):
        return {"messages": _turns(example[shape.name], "user")}
    if shape.name == "text":
        return {"messages": [{"role": "user", "content": ""}, *_turns(example["text"], "assistant")]}
    head, tail = shape.keys[:2]
    prompt = _turns(example[head], "user")
    if extra := example.get("input") if head == "instruction" else None:
        prompt[-1] = {"role": "user", "content": f"{prompt[-1]['content']}\n\n{extra}"}
    return {"messages": [*prompt, *_turns(example[tail], "assistant")]}


def write(row: Row, shape: Shape, render: Render | None = None) -> dict[str, Any]:
    """A conversation in `shape`, with that shape's keys only.

    `render(messages, open)` gives the text of messages in a chat template (`open`: up to where the assistant starts to write). It is
    needed for the shape `text`; shapes of a prompt and an answer are written in the template's marks if it is given.
    Raises ResafeError for a conversation of several turns where the shape holds one, and for `text` without `render`.
    """
    messages: list[Message] = row["messages"]
    if shape.preference:
        return _preference(row, shape, render)
    if shape.name == "messages":
        return {"messages": messages}
    if shape.name == "conversations":
        return {"conversations": [{"from": TO[m["role"]], "value": m["content"]} for m in messages]}
    if shape.name == "text":
        if render is None:
            raise ResafeError("rows of plain 'text' need the chat template of the model that they are for: name its folder with --tokenizer.")
        return {"text": render(messages, False)}
    head, tail = shape.keys[:2]
    if shape.chat:
        return {head: prompt_of(row), tail: messages[-1:]}
    prompt, answer = _texts(messages, shape, render)
    return {**dict.fromkeys(shape.keys, ""), head: prompt, tail: answer}


def _preference(row: Row, shape: Shape, render: Render | None) -> dict[str, Any]:
    if "rejected" not in row:
        raise ResafeError("a safety row for preference data needs an answer to reject.")
    prompt, chosen = prompt_of(row), row["messages"][-1:]
    rejected = [{"role": "assistant", "content": row["rejected"]}]
    if not shape.chat:
        opening, good = _texts([*prompt, *chosen], shape, render)
        return {"prompt": opening, "chosen": good, "rejected": _texts([*prompt, *rejected], shape, render)[1]}
    if "prompt" in shape.keys:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {"chosen": [*prompt, *chosen], "rejected": [*prompt, *rejected]}


def _texts(messages: Sequence[Message], shape: Shape, render: Render | None) -> tuple[str, str]:
    """(prompt, answer) as texts, bare or in the marks of a chat template."""
    if render is None:
        return _one_turn(messages[:-1], shape), messages[-1]["content"]
    prompt, whole = render(messages[:-1], True), render(messages, False)
    if not whole.startswith(prompt):
        raise ResafeError("this chat template renders a prompt differently once its answer stands behind it, so the two cannot be told apart.")
    return prompt, whole[len(prompt) :]


def marked(texts: Iterable[str]) -> bool:
    """Whether texts carry the marks of a chat template, such as <|user|>, [INST] or <start_of_turn>."""
    return any(MARKS.search(text) for text in texts)


def _one_turn(prompt: Sequence[Message], shape: Shape) -> str:
    """A prompt for a shape that holds one text: the user's, a system message in front of it."""
    if [m["role"] for m in prompt if m["role"] != "system"] != ["user"]:
        raise ResafeError(f"a safety row of several turns does not fit data of the shape {shape.name}; leave it out, or use 'messages' data.")
    return "\n\n".join(m["content"] for m in prompt)


def _turns(value: Any, role: str) -> list[Message]:
    """Messages of a text (by `role`) or of a list of messages in either notation; only role and text are kept."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, (list, tuple)) or not value:
        raise ResafeError(f"a text or a list of messages is expected; found {str(value)[:40]!r}.")
    return [_message(m) for m in value]


def _message(value: Any) -> Message:
    if not isinstance(value, Mapping) or not ({"role", "content"} <= set(value) or {"from", "value"} <= set(value)):
        raise ResafeError(f"a message needs a role and a content; found {str(value)[:40]!r}.")
    role = str(value["from"] if "from" in value else value["role"])
    content = value["value"] if "value" in value else value["content"]
    return {"role": FROM.get(role, role), "content": content if isinstance(content, str) else _text(content)}


def _text(parts: Iterable[Any] | None) -> str:
    """The texts of a message that is a list of parts (as of vision models)."""
    return " ".join(str(p.get("text") or "") for p in parts or [] if isinstance(p, Mapping)).strip()


def _common(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, rest of chosen, rest of rejected) of two conversations that open alike."""
    n = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    return chosen[:n], chosen[n:], rejected[n:]
