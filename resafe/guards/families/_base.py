"""What a family of judges is: its prompt, its strict parser, and the few answers between which its logits decide."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from resafe.files import digest
from resafe.guards._base import Exchange, Scale, Verdict, unscored
from resafe.rows import Message

FLOOR = 0.5  # of the probability of all options of a choice together: with less, the likeliest thing was no answer at all
Probabilities = Sequence[Sequence[float]]  # of each choice's options; each sums to 1

# Marks that some chat template gives a meaning to; a tokenizer's own special tokens come on top.
_CONTROL = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|</?think>|<(?:start|end)_of_turn>|<(?:BEGIN|END) [A-Z ]{1,40}>|<[bu]os>|<eos>|<pad>"
)
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?", re.ASCII)


@dataclass(frozen=True)
class Choice:
    """A place in an answer where the judge picks one of a few options; each option is listed with the ways to write it.

    `lead` is written before the pick. `before` is text that stands in front of the lead already (the end of the prompt, say):
    it is not written, but tokenizers cut the lead differently without it.
    """

    options: tuple[tuple[str, ...], ...]
    lead: str = ""
    before: str = ""


@dataclass(frozen=True)
class Family:
    """How a kind of judge is asked and understood.

    `template` holds {prompt} and {response}; without one, the exchange goes through the chat template that the model brings.
    `rubric`: the template is a message to any chat model (with `system` before it), not the text that a model was trained on;
    the judged text then stands between tags that hold a nonce. `weigh` makes a verdict of the probabilities of `choices` and of
    the text after the last one, which is asked for if there is a `tail`. `clip` is the number of the judge's tokens of a
    response that are judged, where the published procedure cuts there; `marked`: it also leaves the tokenizer's own mark of a
    text's start before the response.
    """

    name: str
    parse: Callable[[str], Verdict]
    hint: str  # in the model's name, letters and digits only
    template: str | None = None
    rubric: bool = False
    system: str = ""
    choices: tuple[Choice, ...] = ()
    weigh: Callable[[Probabilities, str], Verdict] | None = None
    tail: bool = False
    clip: int | None = None
    marked: bool = False
    scale: Scale | None = None
    max_tokens: int = 64
    version: int = 2  # of the parser and of the way to read logits

    @property
    def identity(self) -> str:
        """Names the prompt and the parser."""
        prompt = digest([self.template, self.system, self.clip, self.marked])[:12] if self.template else "own"
        return f"{self.name} parser v{self.version} prompt {prompt}"

    def text(self, exchange: Exchange, special: Iterable[str] = (), clip: Callable[[str], str] = str) -> str:
        """The template with the exchange in it, control marks and the `special` tokens in it broken; `clip` cuts the response."""
        prompt, response = (neutralise(part, special) for part in parts(exchange))
        return fill(self.template or "", {"prompt": prompt, "response": clip(response)})

    def messages(self, exchange: Exchange, key: str, special: Iterable[str] = ()) -> list[Message]:
        """What a chat model is asked: the rubric, or the conversation itself for models with a template of their own.

        `key` names the judge; with the exchange it decides the nonce, so the same question is asked in the same words.
        """
        if not self.rubric:
            turns = [*exchange[0], {"role": "assistant", "content": exchange[1]}]
            return [{"role": t["role"], "content": neutralise(t["content"], special)} for t in turns]
        tag = f"text-{digest([key, self.identity, *exchange])[:16]}"
        prompt, response = (f"<{tag}>\n{neutralise(part, special)}\n</{tag}>" for part in parts(exchange))
        asked = {"role": "user", "content": fill(self.template or "", {"prompt": prompt, "response": response})}
        return [{"role": "system", "content": self.system}, asked] if self.system else [asked]


def parts(exchange: Exchange) -> tuple[str, str]:
    """What was asked (all turns, by blank lines) and what was answered, for prompts that have one place for each."""
    return "\n\n".join(m["content"] for m in exchange[0]), exchange[1]


def fill(template: str, values: dict[str, str]) -> str:
    """`template` with its {places} filled in one pass: braces in a value stay what they are."""
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), template)


def published(name: str) -> str:
    """A prompt that ships beside this file, without the line break that ends the file."""
    return Path(__file__).with_name(f"{name}.txt").read_text(encoding="utf-8")[:-1]


def neutralise(text: str, tokens: Iterable[str] = ()) -> str:
    """`text` in which no chat-control mark, and none of `tokens`, is left: a space goes in after its first character."""
    special = sorted((t for t in tokens if len(t.strip()) > 1), key=len, reverse=True)
    pattern = re.compile("|".join([_CONTROL.pattern, *map(re.escape, special)]))
    while (clean := pattern.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)) != text:
        text = clean
    return text


def without_thoughts(text: str) -> str:
    """A chat model's reply without the reasoning block in front of it."""
    return _THOUGHTS.sub("", text).strip()


def unread(text: str) -> Verdict:
    """No verdict from a reply that does not keep to the format: `refusal` if the judge declined to judge, else `parse`."""
    from resafe.guards.rules import is_refusal

    return unscored("empty" if not text else "refusal" if is_refusal(text) else "parse")


def grade(text: str, scale: Scale) -> int | str:
    """A whole number on `scale`; else the reason why not: `parse` for no whole number, `out_of_range` for one outside."""
    if not _NUMBER.fullmatch(text):
        return "parse"
    if not scale[0] <= float(text) <= scale[1]:
        return "out_of_range"
    return int(text) if text.isdecimal() else "parse"
