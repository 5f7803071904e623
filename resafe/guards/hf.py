"""Judges in local folders, run through transformers: by their logits where the family has fixed answers, else greedily."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resafe.errors import ResafeError
from resafe.fingerprint import model_fingerprint
from resafe.guards._base import Exchange, Scale, Verdict, unscored
from resafe.guards.families import Family, family

PROBE = "resafe probe"


class TransformersGuard:
    """A judge's folder. `family_name` (or a Family) overrides what the folder's name says. Raises ResafeError for unusable ones."""

    def __init__(self, path: str | Path, family_name: str | Family | None = None, batch_size: int = 16) -> None:
        from resafe import chat
        from resafe.guards._choice import places
        from resafe.models import load, read_config, vet

        folder = vet(Path(path))
        hint = str(read_config(folder / "config.json").get("_name_or_path", "")) if (folder / "config.json").is_file() else ""
        self.family = family_name if isinstance(family_name, Family) else family(family_name, folder.resolve().name, hint)
        self.loaded = load(folder)
        self.batch_size = batch_size
        self._raw = self.family.template is not None and not self.family.rubric
        self._wrap = str if self._raw else _content_shape(self.loaded.tokenizer, folder)
        self._special = special_tokens(self.loaded.tokenizer)
        self._places = places(self.loaded.tokenizer, self.family)
        self.name = f"{self.family.name}:{folder.resolve().name}"
        template = chat.template_id(self.loaded.tokenizer)
        kind = str(self.loaded.model.dtype).removeprefix("torch.")  # another precision may turn a close verdict
        self.identity = f"{self.family.identity} template {template} weights {model_fingerprint(folder)[:16]} {kind}"

    @property
    def scale(self) -> Scale | None:
        """The scale of the family's ratings."""
        return self.family.scale

    def classify(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Verdicts of the model; an exchange that does not fit its context is `truncated`, not judged in part."""
        verdicts = {i: unscored("empty") for i, e in enumerate(exchanges) if not e[1].strip()}
        prompts = {i: self.prompt(e) for i, e in enumerate(exchanges) if i not in verdicts}
        verdicts |= {i: unscored("truncated") for i, ids in prompts.items() if not self._fits(ids)}
        asked = [i for i in prompts if i not in verdicts]
        verdicts |= zip(asked, self._judged([exchanges[i] for i in asked], [prompts[i] for i in asked]), strict=True)
        return [verdicts[i] for i in range(len(exchanges))]

    def prompt(self, exchange: Exchange) -> list[int]:
        """The tokens that the model is asked with."""
        from resafe import chat

        tokenizer = self.loaded.tokenizer
        if not self._raw:
            return chat.next_turn_ids(tokenizer, self._messages(exchange))
        text = self.family.text(exchange, self._special, self._clipped)
        marked = text.startswith("<s>")  # the published text of WildGuard brings its own mark of the start
        return list(tokenizer.encode(text, add_special_tokens=not marked))

    def _judged(self, exchanges: Sequence[Exchange], prompts: Sequence[list[int]]) -> list[Verdict]:
        from resafe.generate import generate
        from resafe.guards._choice import decide

        if not exchanges:
            return []
        if self._places:
            return decide(self.loaded, self.family, self._places, prompts, self.batch_size)
        asked = [self._messages(e) for e in exchanges]
        answers = generate(self.loaded, asked, self.family.max_tokens, self.batch_size)
        return [self.family.parse(a.text) if a.finished else unscored("truncated") for a in answers]

    def _messages(self, exchange: Exchange) -> list[Any]:
        turns = self.family.messages(exchange, self.identity, self._special)
        return [{"role": t["role"], "content": self._wrap(t["content"])} for t in turns]

    def _clipped(self, response: str) -> str:
        if self.family.clip is None:
            return response
        ids = self.loaded.tokenizer.encode(response, add_special_tokens=self.family.marked)
        if len(ids) <= self.family.clip and not self.family.marked:
            return response  # as it is: decoding may move a space
        return str(self.loaded.tokenizer.decode(ids[: self.family.clip]))

    def _fits(self, prompt: list[int]) -> bool:
        from resafe.guards._choice import room

        plan = self._places
        answer = len(plan[0].lead) + room(self.family, plan) if plan else self.family.max_tokens
        config = self.loaded.model.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20
        return len(prompt) + answer <= int(limit)


def special_tokens(tokenizer: Any) -> frozenset[str]:
    """Every text that the tokenizer turns into a token of its own outside the ordinary vocabulary."""
    added = {str(t.content) for t in tokenizer.added_tokens_decoder.values()}
    return frozenset(added | set(tokenizer.all_special_tokens))


def _text_part(text: str) -> Any:
    return [{"type": "text", "text": text}]


def _content_shape(tokenizer: Any, folder: Path) -> Any:
    """Content as text or, for templates of multimodal models, as a list with one text part: whichever gets rendered."""
    failure = "the text is not rendered"
    for wrap in (str, _text_part):
        turns = [{"role": "user", "content": wrap(f"{PROBE} 1")}, {"role": "assistant", "content": wrap(f"{PROBE} 2")}]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise anything
            failure = str(error)[:200]
            continue
        if f"{PROBE} 1" in text and f"{PROBE} 2" in text:
            return wrap
    raise ResafeError(f"the chat template in {folder} cannot render an exchange to judge ({failure}): is this a guard model?")
