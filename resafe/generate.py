"""Batched greedy generation: longest first within sorted batches, left-padded, the answers back in the order asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from resafe import chat
from resafe.models import Loaded
from resafe.rows import Message


@dataclass(frozen=True)
class Answer:
    """What a model wrote: text without special tokens, number of tokens, and whether it ended by itself."""

    text: str
    tokens: int
    finished: bool


def generate(
    loaded: Loaded,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int = 256,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Greedy answers to `conversations`, in their order; `progress` is told how many a batch has finished.

    Prompts that leave no room in the model's context are cut on the left.
    """
    room = getattr(loaded.model.config, "max_position_embeddings", None) or 1 << 20
    keep = max(1, room - max_new_tokens)
    prompts = [chat.prompt_ids(loaded.tokenizer, c)[-keep:] for c in conversations]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: list[Answer | None] = [None] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for i, answer in zip(batch, _batch(loaded, [prompts[i] for i in batch], max_new_tokens)):
            answers[i] = answer
        if progress:
            progress(len(batch))
    return [a for a in answers if a is not None]


def _batch(loaded: Loaded, prompts: list[list[int]], max_new_tokens: int) -> list[Answer]:
    import torch

    pad, width = loaded.tokenizer.pad_token_id, max(len(p) for p in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=loaded.model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=loaded.model.device)
    stops = end_tokens(loaded)
    with torch.inference_mode():
        out = loaded.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
            temperature=None, top_p=None, top_k=None, pad_token_id=pad, eos_token_id=stops,
        )  # fmt: skip
    return [_answer(loaded.tokenizer, row, stops) for row in out[:, width:].tolist()]


def _answer(tokenizer: Any, ids: list[int], stops: list[int]) -> Answer:
    end = next((i for i, t in enumerate(ids) if t in stops), len(ids))
    return Answer(tokenizer.decode(ids[:end], skip_special_tokens=True).strip(), end, end < len(ids))


def end_tokens(loaded: Loaded) -> list[int]:
    """Ids that end an answer: the tokenizer's end of sequence and whatever the generation config adds to it."""
    configured = loaded.model.generation_config.eos_token_id
    extra = configured if isinstance(configured, list) else [configured]
    return sorted({loaded.tokenizer.eos_token_id, *(e for e in extra if e is not None)})
