"""How many prompts a decision needs: counted upwards with an independent interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from statsmodels.stats.proportion import proportion_confint

from resafe.eval import stats
from resafe.eval.gate import Rule, measure
from tests.eval import tango_reference


def interval(cells: Sequence[float], n: int, level: float) -> tuple[float, float]:
    return tango_reference.limits(n * cells[1], n * cells[2], n, level)


POWER_80 = 0.8416212335729143  # normal quantile


@pytest.mark.parametrize("counts", [(2, 2, 2, 94), (10, 1, 2, 87), (40, 3, 3, 54), (0, 0, 1, 99)])
def test_prompts_needed_to_be_kept_equal_a_count_upwards(counts: tuple[int, ...]) -> None:
    before, after = columns(counts)
    cells = [x / sum(counts) for x in counts]
    spread = math.sqrt(cells[1] + cells[2] - (cells[2] - cells[1]) ** 2)
    n = 1
    while interval(cells, n, 0.95)[1] + POWER_80 * spread / math.sqrt(n) >= 0.03:
        n += 1
    assert measure("j", ("s",), before, after, Rule(0.03, False)).needed == n > sum(counts)


@pytest.mark.parametrize("counts", [(1, 2, 6, 41), (10, 0, 3, 37)])
def test_prompts_needed_to_be_degraded_equal_a_count_upwards(counts: tuple[int, ...]) -> None:
    before, after = columns(counts)
    cells = [x / sum(counts) for x in counts]
    spread = math.sqrt(cells[1] + cells[2] - (cells[2] - cells[1]) ** 2)
    n = 1
    while interval(cells, n, 0.99)[0] - POWER_80 * spread / math.sqrt(n) <= 0:
        n += 1
    assert measure("j", ("s",), before, after, Rule(0.03, False, strict=0.99)).needed == n > sum(counts)


def columns(counts: Sequence[int]) -> tuple[list[bool | None], list[bool | None]]:
    """(both, before only, after only, neither) as two columns."""
    pairs = [(True, True), (True, False), (False, True), (False, False)]
    votes = [pair for pair, count in zip(pairs, counts) for _ in range(count)]
    return [b for b, _ in votes], [a for _, a in votes]


def test_what_should_rise_needs_as_many_prompts_as_its_mirror_image() -> None:
    before, after = columns((10, 1, 2, 87))
    mirrored = [not x for x in before], [not x for x in after]
    assert measure("j", ("s",), *mirrored, Rule(0.03, True)).needed == measure("j", ("s",), before, after, Rule(0.03, False)).needed


def test_the_prompts_that_are_called_for_suffice_four_times_in_five() -> None:
    before, after = columns((3, 4, 4, 89))
    needed = measure("j", ("s",), before, after, Rule(0.03, False)).needed
    assert needed is not None
    assert stats.power_non_inferior(needed, margin=0.03, discordance=0.08) == pytest.approx(0.8, abs=0.03)


def test_prompts_needed_for_a_floor_equal_a_count_upwards() -> None:
    n = 1
    while proportion_confint(0.6 * n, n, 0.05, "wilson")[0] - POWER_80 * math.sqrt(0.24 / n) < 0.5:
        n += 1
    assert measure("j", ("s",), [*[True] * 12, *[False] * 8], [*[True] * 12, *[False] * 8], Rule(0.5, True, floor=True)).needed == n
