"""How many prompts an audit takes: against simulation, and what missing verdicts leave open."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from resafe.errors import ResafeError
from resafe.eval.stats import (
    bounds,
    bounds_difference,
    bounds_mean,
    crosses,
    non_inferior,
    power_non_inferior,
    sample_size_for_margin,
)
from tests.eval import tango_reference


@pytest.mark.parametrize(
    ("n", "rate", "margin", "discordance", "higher"),
    [(100, 0.05, 0.06, 0.05, False), (150, 0.6, 0.05, 0.1, True), (60, 0.02, 0.08, 0.04, False)],
)
def test_the_power_of_kept_is_its_share_of_simulated_audits(
    n: int, rate: float, margin: float, discordance: float, higher: bool
) -> None:
    rng = np.random.default_rng(5)
    cells = [rate - discordance / 2, discordance / 2, discordance / 2, 1 - rate - discordance / 2]
    kept = 0
    for a, b, c, d in rng.multinomial(n, cells, size=1500):
        before = [True] * (a + b) + [False] * (c + d)
        after = [True] * a + [False] * b + [True] * c + [False] * d
        kept += non_inferior(before, after, margin, higher_is_better=higher) == "kept"
    expected = power_non_inferior(n, margin, discordance)
    assert 0.1 < expected < 0.999 and stats.binomtest(kept, 1500, expected).pvalue > 0.001


def test_the_power_of_kept_equals_the_sum_over_every_table() -> None:
    n, margin, discordance = 25, 0.3, 0.2
    total = 0.0
    for b, c in itertools.product(range(n + 1), repeat=2):
        if b + c <= n and tango_reference.limits(b, c, n)[0] > -margin:
            total += float(stats.multinomial.pmf([b, c, n - b - c], n, [0.1, 0.1, 0.8]))
    assert power_non_inferior(n, margin, discordance) == pytest.approx(total, abs=1e-5)


def test_with_the_prompts_asked_for_the_power_is_there_and_with_fewer_it_is_not() -> None:
    needed = sample_size_for_margin(0.03, power=0.8, discordance=0.04)
    assert needed is not None
    powers = [power_non_inferior(n, 0.03, 0.04) for n in (needed - 1, needed)]
    assert powers[0] < 0.8 <= powers[1]


def test_a_smaller_margin_more_discordance_or_a_higher_power_take_more_prompts() -> None:
    plain = sample_size_for_margin(0.05, 0.8, 0.06) or 0
    assert 0 < plain < (sample_size_for_margin(0.04, 0.8, 0.06) or 0)
    assert plain < (sample_size_for_margin(0.05, 0.8, 0.12) or 0)
    assert plain < (sample_size_for_margin(0.05, 0.9, 0.06) or 0)


def test_systems_that_never_differ_need_wilsons_bound_within_the_margin() -> None:
    z = stats.norm.ppf(0.975)
    assert sample_size_for_margin(0.02, discordance=0) == int(z**2 * (1 - 0.02) / 0.02) + 1


def test_what_no_number_of_prompts_can_show_is_none() -> None:
    assert sample_size_for_margin(0.01, 0.8, 0.5, most=500) is None
    needed = sample_size_for_margin(0.05, 0.8, 0.06)
    assert needed is not None and sample_size_for_margin(0.05, 0.8, 0.06, most=needed) == needed
    assert sample_size_for_margin(0.05, 0.8, 0.06, most=needed - 1) is None


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(ResafeError, match="share of the prompts between 0 and 1; found 1.2"):
        sample_size_for_margin(0.02, 0.8, 1.2)
    with pytest.raises(ResafeError, match="write 2 points as 0.02"):
        sample_size_for_margin(2, 0.8, 0.02)


def test_missing_values_bound_a_difference_as_every_way_to_fill_them() -> None:
    before, after = [1.0, None, 3.0, None, 5.0], [2.0, 4.0, None, None, 5.0]
    filled = []
    for x in itertools.product([1, 2, 3, 4, 5], repeat=4):
        one, two = [1, x[0], 3, x[1], 5], [2, 4, x[2], x[3], 5]
        filled.append(np.mean(two) - np.mean(one))
    assert bounds_difference(before, after, 1, 5) == pytest.approx((min(filled), max(filled)))


def test_yes_or_no_with_nothing_missing_has_no_room() -> None:
    assert bounds_difference([True, False], [False, False]) == (-0.5, -0.5)
    assert bounds_mean([True, None, False, None]) == bounds(1, 2, 4) == (0.25, 0.75)
    assert bounds_mean([], 1, 5) == (1, 5)


def test_a_winner_is_named_only_on_one_side_of_zero() -> None:
    assert not crosses((0.01, 0.2)) and not crosses((-0.2, -0.01))
    assert crosses((-0.1, 0.1)) and crosses((0.0, 0.1)) and crosses((-0.1, 0.0))
    assert crosses((0.01, 0.2), at=0.1)


def test_bounds_of_other_prompts_are_refused() -> None:
    with pytest.raises(ResafeError, match="found 1 and 2"):
        bounds_difference([True], [True, None])
