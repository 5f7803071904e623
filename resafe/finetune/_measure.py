"""Utility of a checkpoint on held-out rows without generating: the share of answer tokens that it predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from resafe import models
from resafe.rows import Row
from resafe.sft import tokenised


def token_accuracy(rows: Sequence[Row], limit: int = 256, max_length: int = 1024, batch: int = 16) -> Callable[[Path], float]:
    """A `Run.measure`: folder -> share (0..1) of assistant tokens that are the model's first choice, teacher-forced."""
    chosen = list(rows)[:limit]

    def measure(folder: Path) -> float:
        import torch

        loaded = models.load(folder)
        data = tokenised(loaded.tokenizer, chosen, max_length)
        right = total = 0
        for start in range(0, len(data), batch):
            part = data[start : start + batch]
            width = max(len(d["input_ids"]) for d in part)
            ids = torch.tensor([d["input_ids"] + [loaded.tokenizer.pad_token_id] * (width - len(d["input_ids"])) for d in part])
            wanted = torch.tensor([d["assistant_masks"] + [0] * (width - len(d["input_ids"])) for d in part])[:, 1:].bool()
            seen = torch.tensor([[1] * len(d["input_ids"]) + [0] * (width - len(d["input_ids"])) for d in part])
            with torch.inference_mode():
                device = loaded.model.device
                guess = loaded.model(input_ids=ids.to(device), attention_mask=seen.to(device)).logits[:, :-1].argmax(-1).cpu()
            right += int((guess == ids[:, 1:])[wanted].sum())
            total += int(wanted.sum())
        return right / total

    return measure
