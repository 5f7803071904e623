"""One batch through transformers' own `generate`, for models whose cache the engine cannot take apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from resafe.backends._batch import Row
from resafe.backends._draw import choose


def write_batch(model: Any, rows: Sequence[Row], stops: Sequence[int], pad: int) -> None:
    """Write the whole answers of `rows`."""
    import torch

    width = max(len(row.job.ids) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row.job.ids)) + row.job.ids for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row.job.ids)) + [1] * len(row.job.ids) for row in rows], device=model.device)
    jobs = [row.job for row in rows]

    def forced(ids: Any, scores: Any) -> Any:
        """Scores that leave nothing but our own choice."""
        chosen = choose(scores, jobs, [ids.shape[1] - width] * len(jobs))
        found = torch.full_like(scores, -torch.inf)
        found[range(len(chosen)), chosen] = 0.0
        return found

    with torch.inference_mode(), _own_defaults(model):
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max(job.max_new_tokens for job in jobs), do_sample=False,
            num_beams=1, pad_token_id=pad, eos_token_id=list(stops),
            logits_processor=[forced] if any(job.sampling.temperature > 0 for job in jobs) else None,
        )  # fmt: skip
    for row, written in zip(rows, out[:, width:].tolist()):
        for token in written:
            if not row.ended:
                row.add(token, stops)


@contextmanager
def _own_defaults(model: Any) -> Iterator[None]:
    """Put the generation config of the model's folder (penalties, forced tokens, ...) aside, since `generate` fills in from it."""
    from transformers import GenerationConfig

    defaults: Any = GenerationConfig
    found, model.generation_config = model.generation_config, defaults()
    try:
        yield
    finally:
        model.generation_config = found
