"""Draws follow the distribution that was asked for, and are decided by the job alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import TopPLogitsWarper

from resafe.backends import Sampling
from resafe.backends._draw import Job, choose, draw, uniform

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 3.0, 0.0, 1.0]])
N = 4000


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.7, 0.8), (1.0, 0.3), (1.0, 0.95)])
def test_draws_follow_the_nucleus_that_transformers_gives(temperature: float, top_p: float) -> None:
    expected = TopPLogitsWarper(top_p)(None, LOGITS / temperature) if top_p < 1 else LOGITS / temperature
    grid = [(k + 0.5) / N for k in range(N)]  # an even grid of chances: the counts are the probabilities
    counts = Counter(draw(LOGITS.expand(N, -1), [Sampling(temperature, top_p)] * N, grid))
    for token, p in enumerate(expected.softmax(-1)[0].tolist()):
        assert counts[token] == pytest.approx(N * p, abs=1.01), f"token {token}"


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    assert draw(logits.expand(3, -1), [Sampling(1.0)] * 3, [0.0, 0.5, 1 - 2**-53]) == [1, 3, 3]


def test_greedy_and_sampled_rows_stand_side_by_side() -> None:
    jobs = [Job([1], 9), Job([1], 9, Sampling(50.0, seed=1)), Job([2], 9), Job([3], 9, Sampling(50.0, seed=1))]
    tokens = [choose(LOGITS.expand(4, -1), jobs, [step] * 4) for step in range(60)]
    assert {(t[0], t[2]) for t in tokens} == {(3, 3)} and len({t[1] for t in tokens}) > 3
    assert [t[1] for t in tokens] != [t[3] for t in tokens]


def test_chances_are_uniform_and_differ_by_job_and_step() -> None:
    from scipy import stats

    jobs = [Job([k], 9, Sampling(1.0, seed=s)) for k in range(25) for s in range(4)]
    found = [uniform(job.key, step) for job in jobs for step in range(10)]
    assert len(set(found)) == 1000 and stats.kstest(found, "uniform").pvalue > 0.01


def test_how_sharp_or_long_an_answer_may_be_changes_no_chance() -> None:
    assert Job([1, 2], 5, Sampling(1.0, seed=4)).key == Job([1, 2], 9, Sampling(0.5, 0.9, seed=4)).key
