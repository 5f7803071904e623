"""Writes the answers to many prompts with one model: rows that end leave the batch, and waiting prompts take their places.

Prompts enter longest first, so that neighbours need little padding and a batch that is too large fails at once. A prompt is read
apart from the rows that are being written, then its cache is joined to theirs. Nothing of a model's generation config is used: greedy
is the likeliest token and nothing else. Models whose cache cannot be taken apart (`_cache.joinable`) are asked in fixed batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from resafe.backends import _cache
from resafe.backends._batch import Batch, Row
from resafe.backends._draw import Job
from resafe.backends._plain import write_batch
from resafe.errors import ResafeError

VERSION = 1  # raise when the same request may get another answer
SLACK = 8  # rows are let in, or a batch made smaller, when an eighth of its places is free


def write(model: Any, jobs: Sequence[Job], batch_size: int, stops: Sequence[int], pad: int) -> Iterator[tuple[int, list[int]]]:
    """(position of a job, ids of its answer with the token that ended it, if any), as the answers end.

    Where a batch does not fit the accelerator's memory, it is halved for good. Raises ResafeError when a single row does not fit.
    """
    import torch

    rows = sorted((Row(i, job) for i, job in enumerate(jobs)), key=lambda row: -len(row.job.ids))
    way = _joining if _cache.joinable(model) else _fixed
    while rows:
        try:
            for row in way(model, rows, batch_size, stops, pad):
                yield row.at, row.written
            return
        except torch.cuda.OutOfMemoryError as error:
            failure = str(error).splitlines()[0]
        rows = [row for row in rows if not row.ended]  # what they have written is read again
        if batch_size == 1 or len(rows) == 1:
            raise ResafeError(f"out of memory with a single prompt of {len(rows[0].job.ids)} tokens: {failure}")
        batch_size = max(1, min(batch_size, len(rows)) // 2)
        torch.cuda.empty_cache()


def _joining(model: Any, rows: Sequence[Row], size: int, stops: Sequence[int], pad: int) -> Iterator[Row]:
    """Rows as they end; their places are filled again."""
    waiting, batch = deque(rows), Batch(model, pad)
    while waiting or any(not row.ended for row in batch.rows):
        for row, token in _advance(batch, waiting, size):
            if not row.ended:
                row.add(token, stops)
                if row.ended:
                    yield row


def _advance(batch: Batch, waiting: deque[Row], size: int) -> list[tuple[Row, int]]:
    """Let rows in or write one token, whichever is due: some rows and the next token of each."""
    live = sum(not row.ended for row in batch.rows)
    free = size - live
    if waiting and (not live or free > size // SLACK):
        fresh = [waiting.popleft() for _ in range(min(free, len(waiting)))]
        return list(zip(fresh, batch.refill(fresh)))
    if not waiting and len(batch.rows) - live > len(batch.rows) // SLACK:
        batch.refill([])
    return list(zip(batch.rows, batch.step()))


def _fixed(model: Any, rows: Sequence[Row], size: int, stops: Sequence[int], pad: int) -> Iterator[Row]:
    """Rows in batches of `size`, each of which waits for its longest answer."""
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        write_batch(model, batch, stops, pad)
        yield from batch
