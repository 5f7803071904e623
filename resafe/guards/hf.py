"""Guard models in local folders, run through transformers with greedy decoding."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resafe.errors import ResafeError
from resafe.files import digest
from resafe.guards._base import Exchange, Verdict, unscored
from resafe.guards.families import Family, family, neutralise

PROBE = "resafe probe"


class TransformersGuard:
    """A guard model's folder. `family_name` overrides what the folder's name says. Raises ResafeError for unusable ones."""

    def __init__(self, path: str | Path, family_name: str | None = None, batch_size: int = 16) -> None:
        from resafe import chat
        from resafe.models import load, read_config, vet

        folder = vet(Path(path))
        hint = str(read_config(folder / "config.json").get("_name_or_path", "")) if (folder / "config.json").is_file() else ""
        self.family: Family = family(family_name, folder.resolve().name, hint)
        self.loaded = load(folder)
        self.batch_size = batch_size
        if self.family.template:
            self.loaded.tokenizer.chat_template = self.family.template
        self._wrap = _content_shape(self.loaded.tokenizer, folder)
        self._special = special_tokens(self.loaded.tokenizer)
        self.name = f"{self.family.name}:{folder.resolve().name}"
        template = chat.template_id(self.loaded.tokenizer)
        self.identity = f"{self.family.identity} template {template} weights {fingerprint(folder)}"

    def classify(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Verdicts of the model; an exchange that does not fit its context is `truncated`, not judged in part."""
        from resafe.generate import generate

        conversations = [self._messages(e) for e in exchanges]
        verdicts = {i: unscored("empty") for i, e in enumerate(exchanges) if not e[1].strip()}
        verdicts |= {i: unscored("truncated") for i, c in enumerate(conversations) if i not in verdicts and not self._fits(c)}
        asked = [i for i in range(len(exchanges)) if i not in verdicts]
        answers = generate(self.loaded, [conversations[i] for i in asked], self.family.max_tokens, self.batch_size) if asked else []
        for i, answer in zip(asked, answers, strict=True):
            verdicts[i] = self.family.parse(answer.text) if answer.finished else unscored("truncated")
        return [verdicts[i] for i in range(len(exchanges))]

    def _messages(self, exchange: Exchange) -> list[Any]:
        conversation, response = exchange
        turns = [*conversation, {"role": "assistant", "content": response}]
        return [{"role": t["role"], "content": self._wrap(neutralise(t["content"], self._special))} for t in turns]

    def _fits(self, conversation: list[Any]) -> bool:
        from resafe import chat

        config = self.loaded.model.config
        room = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20
        return len(chat.prompt_ids(self.loaded.tokenizer, conversation)) + self.family.max_tokens <= int(room)


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


def fingerprint(folder: Path) -> str:
    """Hash of names, sizes, headers and both ends of the weight files: quick on files of many gigabytes."""
    sums = []
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        with file.open("rb") as f:
            head = f.read(1 << 20)
            f.seek(max(0, file.stat().st_size - (1 << 20)))
            sums.append([file.name, file.stat().st_size, hashlib.sha256(head + f.read()).hexdigest()])
    return digest(sums)[:12]
