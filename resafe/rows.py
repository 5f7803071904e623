"""Conversations: read from JSON Lines in the three usual shapes, checked, and held as one shape.

A row is `{"messages": [{"role": ..., "content": ...}, ...], ...}`; keys other than `messages` travel along untouched.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from resafe.errors import ResafeError

Message = dict[str, str]
Row = dict[str, Any]
ROLES = ("system", "user", "assistant")


def read_jsonl(path: Path) -> list[Row]:
    """Rows of a JSON Lines file: `messages`, `prompt`/`completion`, `question`/`answer` or `instruction`/`input`/`output`.

    Raises ResafeError with the file and the line number for whatever is wrong, and for a file without rows.
    """
    return [normalise_row(value, f"{path} line {number}") for number, value, _ in read_objects(path)]


def read_objects(path: Path) -> list[tuple[int, Row, str]]:
    """(line number, JSON object, its text) of every line that is not blank. Raises ResafeError as `read_jsonl` does."""
    if not path.is_file():
        raise ResafeError(f"no such data file: {path}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ResafeError(f"{path} is not UTF-8 text (byte {error.start}): convert it first.") from None
    values = [(n, _parse(line, f"{path} line {n}"), line) for n, line in enumerate(lines, 1) if line.strip()]
    if not values:
        raise ResafeError(f"{path} holds no rows: one JSON object per line is expected.")
    return values


def _parse(line: str, where: str) -> Row:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ResafeError(f"{where}: not valid JSON ({error.msg} at column {error.colno}).") from None
    if not isinstance(value, dict):
        raise ResafeError(f"{where}: expected a JSON object, found {type(value).__name__}.")
    return value


def normalise_row(value: Mapping[str, Any], where: str) -> Row:
    """One row in any of the three shapes -> a checked `messages` row; `where` is named in errors."""
    row = dict(value)
    if "messages" in row:
        pass
    elif "prompt" in row and "completion" in row:
        prompt, completion = row.pop("prompt"), row.pop("completion")
        head = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        tail = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        row["messages"] = [*head, *tail]
    elif "instruction" in row and "output" in row:
        instruction, extra, output = row.pop("instruction"), row.pop("input", ""), row.pop("output")
        user = f"{instruction}\n\n{extra}" if extra else instruction
        row["messages"] = [{"role": "user", "content": user}, {"role": "assistant", "content": output}]
    elif "question" in row and "answer" in row:
        row["messages"] = [
            {"role": "user", "content": row.pop("question")},
            {"role": "assistant", "content": row.pop("answer")},
        ]
    else:
        keys = ", ".join(sorted(row)) or "none"
        raise ResafeError(
            f"{where}: expected the keys messages, prompt+completion, question+answer or instruction+output; found {keys}."
        )
    row["messages"] = _checked(row["messages"], where)
    return row


def read_pairs(path: Path) -> list[tuple[list[Message], str, str]]:
    """(conversation, chosen, rejected) of a preference JSON Lines file with the keys prompt, chosen and rejected.

    `prompt` is a text or a list of messages; the answers are texts or lists with one assistant message.
    """
    pairs = []
    for number, value, _ in read_objects(path):
        where = f"{path} line {number}"
        if missing := {"prompt", "chosen", "rejected"} - set(value):
            raise ResafeError(f"{where}: a preference row needs prompt, chosen and rejected; {', '.join(sorted(missing))} missing.")
        good, bad = (normalise_row({"prompt": value["prompt"], "completion": value[k]}, where) for k in ("chosen", "rejected"))
        pairs.append((prompt_of(good), answer_of(good), answer_of(bad)))
    return pairs


def _checked(messages: Any, where: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise ResafeError(f"{where}: 'messages' must be a non-empty list.")
    clean: list[Message] = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ResafeError(f"{where}: message {i + 1} needs a 'role' and a text 'content'.")
        role = message.get("role")
        if role not in ROLES:
            raise ResafeError(f"{where}: message {i + 1} has role {role!r}; known roles: {', '.join(ROLES)}.")
        clean.append({"role": role, "content": message["content"]})
    turns = [m["role"] for m in clean if m["role"] != "system"]
    if any(m["role"] == "system" for m in clean[1:]):
        raise ResafeError(f"{where}: a system message may only come first.")
    if turns != ["user", "assistant"] * (len(turns) // 2) or not turns:
        raise ResafeError(f"{where}: roles must alternate user, assistant and end with assistant; found {', '.join(turns)}.")
    return clean


def chat(prompt: str, answer: str, **extra: Any) -> Row:
    """A one-turn row."""
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], **extra}


def prompt_of(row: Row) -> list[Message]:
    """The conversation up to, not including, the last assistant message."""
    messages: list[Message] = row["messages"]
    return messages[:-1]


def answer_of(row: Row) -> str:
    """The last assistant message's text."""
    return str(row["messages"][-1]["content"])


def user_text(messages: Sequence[Message]) -> str:
    """The last user message's text."""
    return next(m["content"] for m in reversed(messages) if m["role"] == "user")


def key(text: str) -> str:
    """What two prompts are compared by: NFKC, case-folded letters and digits with single spaces."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def keys(rows: Iterable[Row]) -> set[str]:
    """The `key` of every row's last user message."""
    return {key(user_text(row["messages"])) for row in rows}
