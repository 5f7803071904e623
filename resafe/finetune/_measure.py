"""Utility of a checkpoint on held-out rows, without generating: one teacher-forced pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from resafe import chat, models
from resafe.rows import Row
from resafe.sft import tokenised

BATCH = 16


def held_out_utility(rows: Sequence[Row], limit: int = 256, max_length: int = 1024) -> Callable[[Path], float]:
    """A `Run.measure`: folder -> utility in [0, 1] on the first `limit` rows.

    Utility is the share of answers whose every token is the model's first choice, which is what greedy decoding would get
    exactly right. Where the first model measured gets less than half right in that sense (long, free answers), it is the
    share of such tokens instead, for that model and for all that are compared with it.
    """
    chosen = list(rows)[:limit]
    by_answer: bool | None = None

    def measure(folder: Path) -> float:
        nonlocal by_answer
        answers, tokens = _accuracy(models.load(folder), chosen, max_length)
        if by_answer is None:
            by_answer = answers >= 0.5
        return answers if by_answer else tokens

    return measure


def _accuracy(loaded: models.Loaded, rows: Sequence[Row], max_length: int) -> tuple[float, float]:
    """(share of answers predicted whole, share of answer tokens predicted)."""
    data = tokenised(loaded.tokenizer, rows, max_length)
    hits = [h for start in range(0, len(data), BATCH) for h in _hits(loaded, data[start : start + BATCH])]
    tokens = [t for h in hits for t in h]
    return sum(all(h) for h in hits) / len(hits), sum(tokens) / len(tokens)


def row_votes(folder: Path, rows: Sequence[Row], max_length: int = 1024) -> tuple[list[bool | None], list[float | None]]:
    """For every row, so that two checkpoints compare in pairs: whether its answer is predicted whole, and the share of its tokens that are.

    None where a row has no answer within `max_length` tokens.
    """
    loaded = models.load(folder)
    encoded = [chat.encode(loaded.tokenizer, row["messages"]) for row in rows]
    data = [{"input_ids": e.ids[:max_length], "assistant_masks": e.assistant[:max_length]} for e in encoded]
    scored = [i for i, d in enumerate(data) if any(d["assistant_masks"])]
    whole: list[bool | None] = [None] * len(rows)
    share: list[float | None] = [None] * len(rows)
    for start in range(0, len(scored), BATCH):
        part = scored[start : start + BATCH]
        for i, hits in zip(part, _hits(loaded, [data[i] for i in part])):
            whole[i], share[i] = all(hits), sum(hits) / len(hits)
    return whole, share


def _hits(loaded: models.Loaded, rows: list[dict[str, list[int]]]) -> list[list[bool]]:
    """For every row, whether each of its answer tokens is the model's first choice."""
    import torch

    width = max(len(r["input_ids"]) for r in rows)

    def padded(key: str, fill: int) -> Any:
        return torch.tensor([r[key] + [fill] * (width - len(r[key])) for r in rows])

    ids = padded("input_ids", loaded.tokenizer.pad_token_id)
    wanted = padded("assistant_masks", 0)[:, 1:].bool()
    seen = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
    device = loaded.model.device
    with torch.inference_mode():
        guess = loaded.model(input_ids=ids.to(device), attention_mask=seen.to(device)).logits[:, :-1].argmax(-1).cpu()
    return [(guess[i] == ids[i, 1:])[wanted[i]].tolist() for i in range(len(rows))]
