"""The next token of every row: the likeliest one, or a draw that only the row itself decides. Nucleus: https://arxiv.org/abs/1904.09751

A draw is the inverse of the row's cumulative distribution at a number that a counter-based generator gives for (seed, prompt,
step). So an answer is the same in every batch, a shorter limit gives a prefix of it, and two models that are put the same prompt
with the same seed get the same numbers, which makes their difference less noisy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from resafe.backends._base import GREEDY, Sampling
from resafe.files import digest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Job:
    """A prompt as token ids (at least one), and how it is to be answered."""

    ids: list[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY

    @cached_property
    def key(self) -> int:
        """128 bits that decide the draws."""
        return int(digest([self.sampling.seed, self.ids])[:32], 16)


def uniform(key: int, step: int) -> float:
    """A number in [0, 1) for one step of one job."""
    import numpy as np

    return float(np.random.Generator(np.random.Philox(key=key, counter=step)).random())


def choose(logits: Tensor, jobs: Sequence[Job], steps: Sequence[int]) -> list[int]:
    """The next token of every job, from `logits` of shape (jobs, vocabulary); `steps` counts the tokens that each has written."""
    found: list[int] = logits.float().argmax(-1).tolist()
    drawn = [i for i, job in enumerate(jobs) if job.sampling.temperature > 0]
    if drawn:
        chances = [uniform(jobs[i].key, steps[i]) for i in drawn]
        tokens = draw(logits[drawn], [jobs[i].sampling for i in drawn], chances)
        found = [dict(zip(drawn, tokens)).get(i, token) for i, token in enumerate(found)]
    return found


def draw(logits: Tensor, samplings: Sequence[Sampling], chances: Sequence[float]) -> list[int]:
    """Tokens at the given chances of the rows' cumulative distributions, in the order of the vocabulary."""
    import torch

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    p = torch.softmax(logits.double() / column([s.temperature for s in samplings]), -1)
    if any(s.top_p < 1 for s in samplings):
        ordered, order = p.sort(stable=True, dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= column([s.top_p for s in samplings])  # likelier ones make up top_p already
        p = p.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)
    total = p.cumsum(-1)
    found = torch.searchsorted(total, column(chances) * total[:, -1:], right=True)
    return [int(t) for t in found.clamp(max=logits.shape[1] - 1)[:, 0].tolist()]
