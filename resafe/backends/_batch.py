"""Rows that are being written at the same time, and the cache of what they have said so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from resafe.backends import _cache
from resafe.backends._draw import Job, choose

if TYPE_CHECKING:
    from torch import Tensor

READ = 8192  # tokens that are read at once, which bounds the memory for long prompts
FEW = 1024  # tokens that are worth a reading of their own


@dataclass(eq=False)
class Row:
    """A job on its way: `at` is its position among the jobs, `written` its answer so far."""

    at: int
    job: Job
    written: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def length(self) -> int:
        """Number of tokens of the prompt and of the answer so far."""
        return len(self.job.ids) + len(self.written)

    def add(self, token: int, stops: Sequence[int]) -> None:
        """Write one more token."""
        self.written.append(token)
        self.ended = token in stops or len(self.written) >= self.job.max_new_tokens


class Batch:
    """Rows and their cache, which holds every token but the last of each row; its columns are padded on the left.

    Rows that have ended are still computed, to no effect, until the next `refill`.
    """

    def __init__(self, model: Any, pad: int) -> None:
        self.model, self.pad = model, pad
        self.rows: list[Row] = []
        self._cache: Any = None
        self._mask: Any = None  # (rows, columns), 1 where there is a token

    def refill(self, fresh: Sequence[Row]) -> list[int]:
        """Drop rows that have ended, read `fresh` ones and let them in. The next token of each of these."""
        read = [(group, *self._read(group)) for group in _groups(fresh)]
        ended = [i for i, row in enumerate(self.rows) if row.ended]
        if fresh and len(fresh) == len(ended) and max(row.length for row in fresh) <= self._mask.shape[1]:
            self._replace(ended, [(group, cache) for group, cache, _ in read])
        else:
            self._rebuild([(group, cache) for group, cache, _ in read])
        return [token for group, _, logits in read for token in _next(logits, group)]

    def _replace(self, places: Sequence[int], read: Sequence[tuple[Sequence[Row], Any]]) -> None:
        """Put new rows where others have ended; the rest stays where it is in memory."""
        taken = iter(places)
        for group, cache in read:
            into = [next(taken) for _ in group]
            _cache.replace(self._cache, into, cache)
            for place, row in zip(into, group):
                self.rows[place] = row
        fresh = {row for group, _ in read for row in group}
        self._mask = self._masked([row.length - (row not in fresh) for row in self.rows])
        _cache.trim(self._cache, self._mask.shape[1])

    def _rebuild(self, read: Sequence[tuple[Sequence[Row], Any]]) -> None:
        """A cache of the rows that are being written, and of new ones behind them."""
        live = [i for i, row in enumerate(self.rows) if not row.ended]
        lengths = [self.rows[i].length - 1 for i in live] + [row.length for group, _ in read for row in group]
        parts = [(self._cache, live), *((cache, range(len(group))) for group, cache in read)]
        self.rows = [self.rows[i] for i in live] + [row for group, _ in read for row in group]
        self._mask = self._masked(lengths)
        self._cache = _cache.joined(self.model, [(c, rows) for c, rows in parts if rows], self._mask.shape[1]) if self.rows else None

    def step(self) -> list[int]:
        """The next token of every row."""
        import torch

        device = self.model.device
        last = torch.tensor([[row.written[-1]] for row in self.rows], device=device)
        places = torch.tensor([[row.length - 1] for row in self.rows], device=device)
        self._mask = torch.cat([self._mask, self._mask.new_ones((len(self.rows), 1))], dim=1)
        return _next(self._forward(last, self._mask, places, self._cache), self.rows)

    def _read(self, rows: Sequence[Row]) -> tuple[Any, Tensor]:
        """A cache of everything that `rows` hold, and the logits after it."""
        import torch

        texts = [row.job.ids + row.written for row in rows]
        width = max(map(len, texts))
        ids = torch.tensor([[self.pad] * (width - len(t)) + t for t in texts], device=self.model.device)
        mask = self._masked([len(t) for t in texts])
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        cache, stride = _cache.empty(self.model), max(1, READ // len(rows))
        for start in range(0, width, stride):
            part = slice(start, start + stride)
            logits = self._forward(ids[:, part], mask[:, : start + stride], places[:, part], cache)
        return cache, logits

    def _forward(self, ids: Tensor, mask: Tensor, places: Tensor, cache: Any) -> Tensor:
        """Logits after the last column, (rows, vocabulary); `cache` grows by the columns of `ids`."""
        import torch

        with torch.inference_mode():
            out = self.model(
                input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _masked(self, lengths: Sequence[int]) -> Tensor:
        """(rows, longest), 1 in the last `lengths` columns."""
        import torch

        device, width = self.model.device, max(lengths, default=0)
        return (torch.arange(width, device=device) >= width - torch.tensor(lengths, device=device)[:, None]).long()


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Neighbours that are read together.

    At most READ tokens with their padding, unless a single one is longer; once there are FEW, only others of much the same length.
    """
    groups: list[list[Row]] = []
    widest = 0
    for row in rows:
        held = widest * len(groups[-1]) if groups else 0
        wide = max(widest, row.length)
        alike = min(widest, row.length) >= 0.9 * wide
        if not groups or wide * (len(groups[-1]) + 1) > READ or (held >= FEW and not alike):
            groups.append([])
            wide = row.length
        groups[-1].append(row)
        widest = wide
    return groups


def _next(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    return choose(logits, [row.job for row in rows], [len(row.written) for row in rows])
