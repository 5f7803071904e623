"""Safety rows as the trainer's own pipeline would have tokenised them, found out by reproducing the user's rows.

A row of the user whose text is still there is encoded in every known way; the way that gives the user's token ids is used for the
safety rows too. Where no text is left, the chat template of the trainer's tokenizer is used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from resafe import chat
from resafe.errors import ResafeError
from resafe.rows import Message, Row, answer_of, prompt_of
from resafe.shapes import Shape, marked, read, write

PROBES = 8  # rows of the user that a way of encoding must reproduce
IGNORED = -100
TEMPLATE = "chat template"


@dataclass(frozen=True)
class Tokens:
    """Token ids of a row; where its answer begins; which tokens the assistant wrote (1)."""

    ids: list[int]
    start: int
    assistant: list[int]
    whole: dict[str, Any] = field(default_factory=dict)  # the row in all its columns, where the framework's own template made it


@dataclass(frozen=True)
class Encoder:
    """One way of turning a row into tokens; `name` says which."""

    name: str
    encode: Callable[[Row], Tokens]


def own_tokenizer(trainer: Any) -> Any:
    """A copy of the trainer's tokenizer, made usable (template, padding) without touching the trainer's.

    Raises ResafeError if the trainer has none and its model does not name a folder with one.
    """
    made = trainer.processing_class
    made = getattr(made, "tokenizer", made)
    if made is None:
        made = _from_model(trainer.model)
    made = copy.deepcopy(made)
    template = getattr(trainer, "chat_template", None)  # TRL: a variant with generation marks, if it needed one
    if isinstance(template, str):
        made.chat_template = template
    return chat.prepare(made)


def _from_model(model: Any) -> Any:
    from pathlib import Path

    from resafe.models import load_tokenizer

    folder = Path(str(getattr(model.config, "_name_or_path", "") or "nowhere"))
    if not folder.is_dir():
        raise ResafeError("the trainer has no tokenizer: pass processing_class=tokenizer to it.")
    return load_tokenizer(folder)


def find_encoder(trainer: Any, tokenizer: Any, shape: Shape | None, examples: Sequence[Mapping[str, Any]]) -> Encoder:
    """The way of encoding that gives the token ids of the user's first rows; the chat template where none does.

    Rows whose texts carry the template's marks already are of the template.
    """
    own = trainer_template(trainer, tokenizer) or by_template(tokenizer)
    if shape is None or not examples or in_marks(shape, examples):
        return own
    ways = [own, by_template(tokenizer)] if shape.chat else [*_text_ways(tokenizer, shape), own, by_template(tokenizer)]
    return next((w for w in ways if all(reproduces(w, e, shape) for e in examples[:PROBES])), own)


def in_marks(shape: Shape, examples: Sequence[Mapping[str, Any]]) -> bool:
    """Whether prompts of a shape of plain texts are written in the marks of a chat template."""
    return not shape.chat and shape.name != "text" and "prompt" in shape.keys and marked(e["prompt"] for e in examples[:PROBES])


def reproduces(way: Encoder, example: Mapping[str, Any], shape: Shape) -> bool:
    """Whether `way` gives the user's ids, or a longer sequence that was cut to them."""
    wanted = list(example["input_ids"] if "input_ids" in example else [*example["prompt_ids"], *example["chosen_ids"]])
    try:
        got = way.encode(read(example, shape)).ids
    except ResafeError:
        return False
    return got == wanted or (len(wanted) > 16 and got[: len(wanted)] == wanted)


def by_template(tokenizer: Any) -> Encoder:
    """The tokenizer's chat template."""

    def encode(row: Row) -> Tokens:
        e = chat.encode(tokenizer, row["messages"])
        return Tokens(e.ids, _common(chat.prompt_ids(tokenizer, prompt_of(row)), e.ids), e.assistant)

    return Encoder(TEMPLATE, encode)


def trainer_template(trainer: Any, tokenizer: Any) -> Encoder | None:
    """The framework's own template, which need not be the tokenizer's: ms-swift's on the trainer, LLaMA-Factory's on the collator."""
    swift = getattr(trainer, "template", None)
    if hasattr(swift, "template_meta"):
        return _swift(swift)
    template = getattr(trainer.data_collator, "template", None)
    if template is None or not callable(getattr(template, "encode_multiturn", None)):
        return None

    def encode(row: Row) -> Tokens:
        messages = [dict(m) for m in row["messages"] if m["role"] != "system"]
        system = next((m["content"] for m in row["messages"] if m["role"] == "system"), None)
        ids: list[int] = []
        mask: list[int] = []
        start = 0
        pairs = template.encode_multiturn(tokenizer, messages, system)
        for source, target in pairs:
            start = len(ids) + len(source)
            ids += [*source, *target]
            mask += [0] * len(source) + [1] * len(target)
        if getattr(template, "efficient_eos", False):
            ids, mask = [*ids, tokenizer.eos_token_id], [*mask, 1]
        return Tokens(ids, start, mask)

    return Encoder("LLaMA-Factory template", encode)


def _swift(template: Any) -> Encoder:
    """ms-swift's template gives whole rows: labels, lengths and, for preference data, both answers."""

    def encode(row: Row) -> Tokens:
        asked: dict[str, Any] = {"messages": [dict(m) for m in row["messages"]]}
        side = "chosen_" if template.mode == "rlhf" else ""
        if side:
            asked["rejected_response"] = row["rejected"]
        try:
            given = template.encode(asked, return_length=True)
        except ValueError as error:  # MaxLengthError
            raise ResafeError(f"ms-swift's template cannot encode a safety row: {error}") from None
        mask = [int(v != IGNORED) for v in given[f"{side}labels"]]
        last = max((i for i, m in enumerate(mask) if m), default=0)
        start = next((i + 1 for i in range(last, -1, -1) if not mask[i]), 0)
        return Tokens(list(given[f"{side}input_ids"]), start, mask, dict(given))

    return Encoder("ms-swift template", encode)


def opens_like(tokenizer: Any, sample: Sequence[Mapping[str, Any]]) -> bool:
    """Whether most rows begin with the tokens that every prompt begins with in the chat template; True where it has none."""
    one, other = (chat.prompt_ids(tokenizer, [{"role": "user", "content": c}]) for c in ("a", "b"))
    head = one[: _common(one, other)]
    return 2 * sum(unpadded(e, "input_ids")[: len(head)] == head for e in sample) >= len(sample)


def _text_ways(tokenizer: Any, shape: Shape) -> list[Encoder]:
    """Plain text, with or without an end-of-sequence text behind it, with or without the tokenizer's special tokens."""
    return [_by_text(tokenizer, shape, eos, special) for eos in (True, False) for special in (True, False)]


def _by_text(tokenizer: Any, shape: Shape, eos: bool, special: bool) -> Encoder:
    def encode(row: Row) -> Tokens:
        head, tail = _texts(row, shape, tokenizer)
        whole = head + tail
        if eos and not whole.endswith(tokenizer.eos_token):
            whole += tokenizer.eos_token
        ids = list(tokenizer(whole, add_special_tokens=special)["input_ids"])
        start = _common(list(tokenizer(head, add_special_tokens=special)["input_ids"]), ids) if head else 0
        return Tokens(ids, start, [0] * start + [1] * (len(ids) - start))

    return Encoder(f"plain text{' + eos' if eos else ''}{'' if special else ', no special tokens'}", encode)


def _texts(row: Row, shape: Shape, tokenizer: Any) -> tuple[str, str]:
    """(prompt, answer) in the user's shape; a safety row among whole texts is rendered by the chat template."""
    if shape.name != "text":
        written = write(row if not shape.preference else {**row, "rejected": ""}, shape)
        return written[shape.keys[0]], written[shape.keys[1]]
    if row["messages"][0]["content"] == "":  # a text of the user's, as `read` gives it
        return "", answer_of(row)
    return "", rendered(tokenizer, row["messages"])


def rendered(tokenizer: Any, messages: Sequence[Message], open_: bool = False) -> str:
    """A conversation as the text that the chat template makes of it; `open_`: up to where the assistant starts to write."""
    return str(tokenizer.apply_chat_template(chat.foldable(tokenizer, messages), tokenize=False, add_generation_prompt=open_))


def _common(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens two sequences open with in common."""
    return next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), min(len(prompt), len(whole)))


def label_policy(examples: Sequence[Mapping[str, Any]]) -> str:
    """Which tokens the user's rows are trained on: "all", "answer" (all after the prompt) or "assistant" (turns only).

    Read from `labels`: nothing ignored; one ignored stretch at the front; anything else. Padding does not count.
    """
    policy = "all"
    for example in examples:
        ignored = [v == IGNORED for v in unpadded(example, "labels")]
        if not any(ignored):
            continue
        start = ignored.index(False) if not all(ignored) else len(ignored)
        if any(ignored[start:]):
            return "assistant"
        policy = "answer"
    return policy


def labels(tokens: Tokens, policy: str) -> list[int]:
    """Token ids, ignored where the policy does not train."""
    keep = {"all": [1] * len(tokens.ids), "answer": [int(i >= tokens.start) for i in range(len(tokens.ids))], "assistant": tokens.assistant}
    return [t if k else IGNORED for t, k in zip(tokens.ids, keep[policy])]


def unpadded(example: Mapping[str, Any], column: str) -> list[int]:
    """A token column without the positions that the attention mask leaves out."""
    mask = example.get("attention_mask")
    values = list(example[column])
    return values if mask is None else [v for v, m in zip(values, mask) if m]
