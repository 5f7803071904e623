"""The lab's own small training loop: next-token prediction on rendered conversations, one thread, cosine schedule."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from resafe import chat
from resafe.rows import Row


def fit(
    model: Any,
    tokenizer: Any,
    rows: Iterator[Row],
    steps: int,
    lr: float,
    batch: int = 48,
    answers_only: bool = False,
    log: Callable[[str], None] = lambda _: None,
) -> None:
    """Train `model` in place. Batches are drawn 16 at a time and grouped by length to save padding."""
    import torch

    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    model.train()
    for step, (ids, labels, mask) in enumerate(_batches(tokenizer, rows, batch, answers_only)):
        if step == steps:
            break
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            log(f"step {step + 1}/{steps}  loss {loss.item():.3f}")
    model.eval()


def _batches(tokenizer: Any, rows: Iterator[Row], batch: int, answers_only: bool) -> Iterator[tuple[Any, Any, Any]]:
    rng = random.Random(0)
    while True:
        encoded = sorted((chat.encode(tokenizer, next(rows)["messages"]) for _ in range(16 * batch)), key=lambda e: len(e.ids))
        groups = [encoded[i : i + batch] for i in range(0, len(encoded), batch)]
        rng.shuffle(groups)
        for group in groups:
            yield _tensors(group, tokenizer.pad_token_id, answers_only)


def _tensors(group: list[chat.Encoded], pad: int, answers_only: bool) -> tuple[Any, Any, Any]:
    import torch

    width = max(len(e.ids) for e in group)
    ids = torch.tensor([e.ids + [pad] * (width - len(e.ids)) for e in group])
    mask = torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in group])
    wanted = torch.tensor([e.assistant + [0] * (width - len(e.ids)) for e in group]) if answers_only else mask
    return ids, ids.masked_fill(wanted == 0, -100), mask
