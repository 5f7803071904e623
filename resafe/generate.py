"""Answers of a loaded model to conversations, in the order asked. The work is done by `resafe.backends._engine`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from resafe import chat
from resafe.backends._draw import Job
from resafe.models import Loaded
from resafe.rows import Message


@dataclass(frozen=True)
class Answer:
    """What a model wrote: text without special tokens, number of tokens, and whether it ended by itself.

    `error` is the reason for a missing answer: api_error, timeout, refusal, empty, ...; such an answer is never judged.
    """

    text: str = ""
    tokens: int = 0
    finished: bool = False
    error: str = ""


def generate(
    loaded: Loaded,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int = 256,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Greedy answers to `conversations`, in their order; `progress` is told, about once in a batch, how many more are finished.

    Every answer is a new turn, also after a conversation that ends in an assistant turn: guard models judge such ones.
    Prompts that leave no room in the model's context are cut on the left (`fitted`).
    """
    context = room(loaded.model.config)
    jobs = [fitted(chat.next_turn_ids(loaded.tokenizer, c), max_new_tokens, context) for c in conversations]
    found: dict[int, Answer] = {}
    told = 0
    for i, answer in answers(loaded, jobs, batch_size):
        found[i] = answer
        if progress and (len(found) - told >= batch_size or len(found) == len(jobs)):
            progress(len(found) - told)
            told = len(found)
    return [found[i] for i in range(len(jobs))]


def answers(loaded: Loaded, jobs: Sequence[Job], batch_size: int) -> Iterator[tuple[int, Answer]]:
    """(position in `jobs`, answer) as they are finished. Leaving early frees what they take."""
    from resafe.backends._engine import write

    stops = end_tokens(loaded)
    for i, ids in write(loaded.model, jobs, batch_size, stops, loaded.tokenizer.pad_token_id):
        yield i, _answer(loaded.tokenizer, ids, stops)


def _answer(tokenizer: Any, ids: list[int], stops: list[int]) -> Answer:
    end = next((i for i, t in enumerate(ids) if t in stops), len(ids))
    return Answer(tokenizer.decode(ids[:end], skip_special_tokens=True).strip(), end, end < len(ids))


def end_tokens(loaded: Loaded) -> list[int]:
    """Ids that end an answer: the tokenizer's end of sequence and whatever the generation config adds to it."""
    configured = loaded.model.generation_config.eos_token_id
    extra = configured if isinstance(configured, list) else [configured]
    return sorted({loaded.tokenizer.eos_token_id, *(e for e in extra if e is not None)})


def room(config: Any) -> int:
    """Number of tokens that a model's context holds; 1 << 20 where its configuration does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 20


def fitted(ids: list[int], max_new_tokens: int, context: int, **how: Any) -> Job:
    """A prompt and its limit, made to fit the context: the prompt is cut on the left to leave room for the answer.

    But it keeps half of the context, if it is that long; only then is the answer's limit lowered to what is left.
    """
    kept = ids[-max(1, context - max_new_tokens, context // 2) :]
    return Job(kept, min(max_new_tokens, context - len(kept)), **how)
