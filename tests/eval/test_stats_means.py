"""Means of ratings and shares: intervals that agree with Wilson's, cover, and never claim certainty; Wilcoxon is scipy's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar

from resafe.errors import ResafeError
from resafe.eval.stats import (
    clustered_interval,
    crossed_test,
    mean_interval,
    paired_mean_difference,
    tango_score,
    wilcoxon_signed_rank,
    wilson,
)
from resafe.eval.stats.means import mean_limits, mean_score
from tests.eval import score_reference, tango_reference

RATINGS = st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0]), min_size=1, max_size=60)


@given(st.lists(st.booleans(), min_size=1, max_size=80), st.sampled_from([0.8, 0.95, 0.99]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_column_of_yes_and_no_has_wilsons_interval(votes: list[bool], level: float) -> None:
    assert mean_interval(votes, 0, 1, level) == pytest.approx(wilson(sum(votes), len(votes), level), abs=1e-9)


@given(RATINGS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_interval_holds_the_mean_stays_on_the_scale_and_has_a_width(values: list[float]) -> None:
    low, high = mean_interval(values, 1, 5)
    assert 1 <= low <= np.mean(values) + 1e-9 and np.mean(values) - 1e-9 <= high <= 5 and high - low > 0.001


@given(RATINGS)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_turning_the_scale_around_turns_the_interval_around(values: list[float]) -> None:
    low, high = mean_interval(values, 1, 5)
    assert mean_interval([6 - v for v in values], 1, 5) == pytest.approx((6 - high, 6 - low), abs=1e-9)


@given(RATINGS, st.sampled_from([None, 7.5, 400]), st.sampled_from([None, 1.0, 6.3]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_limits_are_where_the_score_of_the_likeliest_distribution_is_z(values: list[float], n: float | None, z: float | None) -> None:
    found = mean_limits((np.array(values) - 1) / 4, n or len(values), z or stats.norm.ppf(0.975))
    assert [1 + 4 * x for x in found] == pytest.approx(score_reference.limits(values, 1, 5, n, z), abs=1e-8)


def test_the_likeliest_distribution_is_that_of_a_general_optimiser() -> None:
    values, support = [1, 1, 1, 1, 2, 2, 3, 4], np.array([1.0, 2, 3, 4, 5])
    counts = np.array([values.count(v) for v in support])
    for mean in (1.4, 2.2, 3.0, 4.5):
        rules = [{"type": "eq", "fun": lambda p: p.sum() - 1}, {"type": "eq", "fun": lambda p, m=mean: p @ support - m}]
        found = optimize.minimize(lambda p: -counts @ np.log(np.maximum(p, 1e-12)), np.full(5, 0.2), bounds=[(0, 1)] * 5, constraints=rules, tol=1e-12)
        p = score_reference.likeliest(values, 1, 5, mean)
        assert [p.get(v, 0.0) for v in support] == pytest.approx(found.x.tolist(), abs=1e-4)


def test_an_interval_by_hand() -> None:
    # .5 n times: a mean of .5 + e needs a share of 2e at 1, variance 2e (1/4) - e^2; n e^2 = z^2 (e / 2 - e^2)
    n, z = 30, stats.norm.ppf(0.975)
    assert mean_interval([0.5] * n, 0, 1)[1] == pytest.approx(0.5 + z * z / 2 / (n + z * z), abs=1e-12)


@pytest.mark.parametrize("x", [[0.34 - 6e-17] * 64 + [0.34] * 26, [0.52] * 216 + [0.52 - 1e-16] * 68 + [0.52 + 1e-16] * 40])
def test_values_that_differ_by_rounding_count_as_one(x: list[float]) -> None:
    assert mean_interval(x, 0, 1) == pytest.approx(mean_interval([x[0]] * len(x), 0, 1), abs=1e-12)
    prompts, seeds = [i // 2 for i in range(len(x))], [i % 2 for i in range(len(x))]
    for crossed in (None, seeds):
        wide = clustered_interval(x, prompts, crossed=crossed)
        assert wide == pytest.approx(mean_interval([x[0]] * (len(x) // 2), 0, 1), abs=1e-9), "values alike: the prompts count"


@pytest.mark.parametrize("x", [[1e-9] * 10, [1 - 1e-9] * 10, [1e-9, 2e-9, 3e-9], [0, 1e-13, 1], [1e-13] * 5 + [0.0] * 3])
@pytest.mark.parametrize("z", [0.01, 1.96, 63.7])
def test_limits_stay_on_the_scale_next_to_its_ends(x: list[float], z: float) -> None:
    low, high = mean_limits(np.array(x), len(x), z)
    assert 0 <= low <= np.mean(x) + 1e-12 and np.mean(x) - 1e-12 <= high <= 1 and high - low > 1e-6 * z
    turned = mean_limits(1 - np.array(x), len(x), z)
    assert (1 - turned[1], 1 - turned[0]) == pytest.approx((low, high), abs=1e-9)
    assert mean_limits(np.array(x), 0.5 * len(x), z)[1] > high or high == 1, "fewer values say less"


def test_for_many_values_it_is_the_normal_interval() -> None:
    x = np.random.default_rng(0).choice([1, 2, 3, 4, 5], p=[0.4, 0.1, 0.1, 0.1, 0.3], size=100_000)
    half = 1.959964 * x.std() / len(x) ** 0.5
    assert mean_interval(x.tolist(), 1, 5) == pytest.approx((x.mean() - half, x.mean() + half), abs=1e-4)


def test_the_lowest_rating_for_all_still_allows_what_no_hits_allow() -> None:
    assert mean_interval([1] * 100, 1, 5) == pytest.approx((1, 1 + 4 * wilson(0, 100)[1]))


@pytest.mark.parametrize("n", [20, 50, 330])
@pytest.mark.parametrize("rare", [1.0, 0.5, 0.625])
def test_a_constant_column_allows_for_rare_values_that_it_did_not_show(n: int, rare: float) -> None:
    # q with a chance of 1 in 10 that n draws show none of the rare value, were the rest all 0.5
    q = 1 - 0.1 ** (1 / n)
    low, high = mean_interval([0.5] * n, 0, 1)
    assert low <= 0.5 + q * (rare - 0.5) <= high


def test_values_off_the_scale_and_empty_columns_are_refused() -> None:
    with pytest.raises(ResafeError, match="6 is outside the scale 1 to 5"):
        mean_interval([1, 6], 1, 5)
    with pytest.raises(ResafeError, match="nan is outside"):
        mean_interval([float("nan")], 1, 5)
    with pytest.raises(ResafeError, match="at least one value"):
        mean_interval([], 1, 5)
    with pytest.raises(ResafeError, match="from a lower to a higher"):
        mean_interval([1], 5, 1)
    with pytest.raises(ResafeError, match="write 95 % as 0.95"):
        mean_interval([1], 1, 5, level=95)


def test_a_paired_difference_is_in_units_of_the_scale_and_narrower_than_an_unpaired_one() -> None:
    rng = np.random.default_rng(1)
    before = rng.choice([1.0, 3.0, 5.0], size=200)
    after = np.minimum(5.0, before + (rng.random(200) < 0.1))
    found = paired_mean_difference(before.tolist(), after.tolist(), 1, 5)
    assert found.difference == pytest.approx(after.mean() - before.mean()) and found.low < found.difference < found.high
    low, high = mean_interval(before.tolist(), 1, 5)
    assert found.high - found.low < 0.5 * (high - low)


def test_before_and_after_exchanged_mirror_the_difference() -> None:
    before, after = [1, 2, 5, 1, 1, 4], [1, 5, 5, 2, 1, 1]
    one, two = paired_mean_difference(before, after, 1, 5), paired_mean_difference(after, before, 1, 5)
    assert one == pytest.approx((-two.difference, -two.high, -two.low), abs=1e-12)


def test_nothing_changed_is_no_proof_that_nothing_changes() -> None:
    found = paired_mean_difference([1] * 100, [1] * 100, 1, 5)
    assert found.difference == 0 and found.low == pytest.approx(-found.high) and 0.05 < found.high < 0.5


@pytest.mark.parametrize("cells", [(0, 0, 0, 40), (3, 4, 0, 33), (0, 6, 9, 5), (0, 0, 12, 0)])
def test_a_difference_of_votes_is_that_of_rates(cells: tuple[int, int, int, int]) -> None:
    a, b, c, d = cells
    before, after = [5.0] * (a + b) + [1.0] * (c + d), [5.0] * a + [1.0] * b + [5.0] * c + [1.0] * d
    low, high = tango_reference.limits(b, c, sum(cells))
    found = paired_mean_difference(before, after, 1, 5)
    assert found == pytest.approx((4 * (c - b) / sum(cells), 4 * low, 4 * high), abs=1e-9)


def test_changes_are_means_within_the_whole_scale_either_way() -> None:
    before, after = [1.0] * 40 + [3.0] * 5, [1.0] * 30 + [3.0] * 4 + [1.5] * 6 + [3.0] * 3 + [1.0] * 2
    changes = [b - a for a, b in zip(before, after)]
    found = paired_mean_difference(before, after, 1, 5)
    assert found == pytest.approx((np.mean(changes), *score_reference.limits(changes, -4, 4)), abs=1e-8)
    votes = [5 if a > 1 else 1 for a in before], [5 if a > 1 else 1 for a in after]
    wide = paired_mean_difference(*votes, 1, 5)
    assert found.high - found.low < 0.6 * (wide.high - wide.low), "smaller changes tell more than as many votes"


def test_unequal_pairs_are_refused() -> None:
    with pytest.raises(ResafeError, match="found 1 and 2"):
        paired_mean_difference([1], [1, 2], 1, 5)
    with pytest.raises(ResafeError, match="found 2 and 1"):
        wilcoxon_signed_rank([1, 2], [1])


def test_wilcoxon_is_the_share_of_all_signs_that_are_as_extreme() -> None:
    changes = [0.3, -0.1, 0.8, 1.2, -0.5, 0.9, 2.0]
    ranks = stats.rankdata(np.abs(changes))
    seen = abs(sum(r * np.sign(d) for r, d in zip(ranks, changes)))
    sums = [abs(sum(r * s for r, s in zip(ranks, signs))) for signs in itertools.product((1, -1), repeat=7)]
    assert wilcoxon_signed_rank([0] * 7, changes) == pytest.approx(np.mean([s >= seen - 1e-9 for s in sums]), abs=1e-9)


def test_wilcoxon_of_many_ratings_is_the_tie_corrected_normal_approximation() -> None:
    rng = np.random.default_rng(2)
    before, after = rng.integers(1, 6, 120), rng.integers(1, 6, 120)
    changes = (after - before)[after != before].astype(float)
    n, ranks = len(changes), stats.rankdata(np.abs(changes))
    ties = np.unique(np.abs(changes), return_counts=True)[1].astype(float)
    variance = n * (n + 1) * (2 * n + 1) / 24 - (ties**3 - ties).sum() / 48
    z = (ranks[changes > 0].sum() - n * (n + 1) / 4) / variance**0.5
    found = wilcoxon_signed_rank(before.tolist(), after.tolist())
    assert found == pytest.approx(2 * stats.norm.sf(abs(z)), abs=1e-9)
    assert found == pytest.approx(stats.wilcoxon(after, before).pvalue, abs=1e-9)


def test_wilcoxon_of_no_changes_is_1_and_rounding_makes_no_ranks() -> None:
    assert wilcoxon_signed_rank([1, 2, 3], [1, 2, 3]) == 1 and wilcoxon_signed_rank([], []) == 1
    assert wilcoxon_signed_rank([0.1 + 0.2] * 20, [0.3] * 20) == 1
    before, after = [0.0, 0.2, 0.2, 0.4] * 5, [0.2, 0.4, 0.4, 0.2] * 5
    assert wilcoxon_signed_rank(before, after) == pytest.approx(stats.wilcoxon([1, 1, 1, -1] * 5).pvalue, abs=1e-9)


def test_rows_that_share_no_cluster_are_independent() -> None:
    values = [1, 3, 5, 5, 2]
    assert clustered_interval(values, range(5), 1, 5) == mean_interval(values, 1, 5)
    assert clustered_interval(values, range(5), 1, 5, crossed=["s"] * 5) == mean_interval(values, 1, 5)


def test_categories_that_differ_widen_and_those_alike_by_chance_leave_one_standard_error() -> None:
    labels = [i % 10 for i in range(200)]
    alike = [float(i // 10 % 2) for i in range(200)]
    apart = [float(label % 2) for label in labels]
    plain, one, two = mean_interval(alike, 0, 1), clustered_interval(alike, labels), clustered_interval(apart, labels)
    assert two[1] - two[0] > 3 * (plain[1] - plain[0])
    assert one == pytest.approx(wilson(100, 200, 2 * stats.norm.cdf(1) - 1), abs=1e-9)


def test_between_equal_clusters_the_variance_is_that_of_their_means() -> None:
    x = np.random.default_rng(3).choice([0.0, 0.5, 1.0], size=(5, 20)) * np.linspace(0.2, 1, 5)[:, None]
    effective = x.var() / (x.mean(axis=1).var(ddof=1) / 5)
    expected = score_reference.limits(x.ravel().tolist(), 0, 1, effective, stats.t.ppf(0.975, 4))
    found = clustered_interval(x.ravel().tolist(), [i for i in range(5) for _ in range(20)])
    assert found == pytest.approx(expected, abs=1e-8)


def test_a_large_category_makes_the_others_count_for_less() -> None:
    # sums of deviations from .29: -7.2, 1.1, 6.1; sizes count as 100^2 / (80^2 + 10^2 + 10^2) = 1.5 equal ones: 1 degree
    x = np.array([0.2] * 80 + [0.4] * 10 + [0.9] * 10)
    effective = x.var() / ((7.2**2 + 1.1**2 + 6.1**2) * 1.5 / 100**2)
    expected = score_reference.limits(x.tolist(), 0, 1, effective, stats.t.ppf(0.9, 1))
    found = clustered_interval(x.tolist(), "a" * 80 + "b" * 10 + "c" * 10, level=0.8)
    assert found == pytest.approx(expected, abs=1e-8)


def test_seeds_by_hand_two_way_analysis_of_variance() -> None:
    rng = np.random.default_rng(4)
    x = rng.choice([0.0, 0.1], (40, 4)) + rng.choice([0.1, 0.3, 0.6], (40, 1)) + np.linspace(0, 0.2, 4)
    n, s = x.shape
    rest = x - x.mean(axis=1, keepdims=True) - x.mean(axis=0) + x.mean()
    ms = [s * x.mean(axis=1).var(ddof=1), n * x.mean(axis=0).var(ddof=1), (rest**2).sum() / ((n - 1) * (s - 1))]
    total = ms[0] + ms[1] - ms[2]
    freedom = total**2 / (ms[0] ** 2 / (n - 1) + ms[1] ** 2 / (s - 1) + ms[2] ** 2 / ((n - 1) * (s - 1)))
    effective = x.var() / (total / x.size)
    expected = score_reference.limits(x.ravel().tolist(), 0, 1, effective, stats.t.ppf(0.975, freedom))
    labels = [i for i in range(n) for _ in range(s)], list(range(s)) * n
    assert clustered_interval(x.ravel().tolist(), labels[0], crossed=labels[1]) == pytest.approx(expected, abs=1e-8)


def test_no_hits_for_three_seeds_allow_what_no_hits_for_one_do() -> None:
    prompts = [i for i in range(100) for _ in range(3)]
    assert clustered_interval([0.0] * 300, prompts, crossed=[0, 1, 2] * 100) == pytest.approx(wilson(0, 100))


def test_one_category_says_nothing_of_others_and_two_say_little() -> None:
    assert clustered_interval([1, 5, 3], "aaa", 1, 5) == (1, 5)
    votes = [float(i % 4 == 0) for i in range(50)] + [float(i % 3 == 0) for i in range(50)]
    two, plain = clustered_interval(votes, "a" * 50 + "b" * 50), mean_interval(votes, 0, 1)
    assert two[1] - two[0] > 3 * (plain[1] - plain[0])


def test_prompts_asked_of_one_seed_each_do_not_hide_that_seeds_differ() -> None:
    values, seeds = [0.0] * 20 + [1.0] * 20, ["a"] * 20 + ["b"] * 20
    low, high = clustered_interval(values, range(40), crossed=seeds)
    assert low < 0.05 and high > 0.95


def test_clusters_need_a_label_per_value_and_one_row_per_pair() -> None:
    with pytest.raises(ResafeError, match="found 2 for 3"):
        clustered_interval([1, 0, 1], "ab")
    with pytest.raises(ResafeError, match="one row for each pair"):
        clustered_interval([1, 0, 1, 1], "aabb", crossed="xxxy")


@given(RATINGS, st.floats(2, 400), st.floats(0.2, 4))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_score_of_a_limit_is_z(values: list[float], n: float, z: float) -> None:
    x = (np.array(values) - 1) / 4
    for limit, sign in zip(mean_limits(x, n, z), (1, -1)):
        if 1e-6 < limit < 1 - 1e-6:
            assert mean_score(x, n, limit) == pytest.approx(sign * z, abs=1e-4)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(41, 200))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_score_of_no_change_is_mcnemars(b: int, c: int, n: int) -> None:
    changes = np.array([0.0] * b + [1.0] * c + [0.5] * (n - b - c))
    assert mean_score(changes, n, 0.5) == pytest.approx(float(tango_score(b, c, n, 0)), abs=1e-9)
    if b + c:
        assert stats.norm.sf(abs(mean_score(changes, n, 0.5))) * 2 == pytest.approx(mcnemar([[0, b], [c, 0]], exact=False, correction=False).pvalue, abs=1e-9)


def test_the_test_over_seeds_is_students_of_the_score_worth_fewer_rows() -> None:
    rng = np.random.default_rng(3)
    x = rng.choice([-1.0, 0.0, 1.0], size=(40, 3), p=[0.1, 0.6, 0.3])
    prompts, seeds = [i for i in range(40) for _ in range(3)], list(range(3)) * 40
    squares = [3 * ((x.mean(1) - x.mean()) ** 2).sum() / 39, 40 * ((x.mean(0) - x.mean()) ** 2).sum() / 2]
    rest = ((x - x.mean(1, keepdims=True) - x.mean(0, keepdims=True) + x.mean()) ** 2).sum() / 78
    total = max(squares[0] + squares[1] - rest, *squares)
    freedom = total**2 / (squares[0] ** 2 / 39 + squares[1] ** 2 / 2 + rest**2 / 78)
    worth = x.var() / (total / 120)
    z = float(tango_score((x < 0).mean() * worth, (x > 0).mean() * worth, worth, 0))
    assert crossed_test(x.ravel().tolist(), prompts, seeds, -1, 1) == pytest.approx(2 * stats.t.sf(abs(z), freedom), abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_the_test_over_seeds_agrees_with_the_interval(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, count = int(rng.integers(10, 60)), int(rng.integers(2, 6))
    x = rng.choice([-1.0, -0.2, 0.0, 0.6, 1.0], size=n * count, p=[0.05, 0.1, 0.6, 0.15, 0.1]).tolist()
    prompts, seeds = [i for i in range(n) for _ in range(count)], list(range(count)) * n
    p = crossed_test(x, prompts, seeds, -1, 1)
    for level in (1 - p - 1e-6, 1 - p + 1e-6):
        if 0 < level < 1:
            low, high = clustered_interval(x, prompts, -1, 1, level, crossed=seeds)
            assert (low <= 0 <= high) == (p > 1 - level)


def test_nothing_changed_over_seeds_is_no_evidence_and_one_prompt_none_of_others() -> None:
    assert crossed_test([0.0] * 6, [0, 0, 1, 1, 2, 2], [0, 1] * 3, -1, 1) == 1.0
    assert crossed_test([1.0, 1.0], ["a", "a"], [0, 1], -1, 1) == 1.0
    assert crossed_test([1.0] * 200, [i // 2 for i in range(200)], [0, 1] * 100, -1, 1) < 1e-6
