"""Statistics equal scipy's and independent formulas, and cover what they promise to cover."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, special, stats

from resafe.errors import ResafeError
from resafe.eval.stats import (
    Table,
    bounds,
    cluster_bootstrap,
    cohen_kappa,
    crosstab,
    holm,
    mcnemar_exact,
    non_inferior,
    paired_difference,
    power_mcnemar,
    prompts_needed,
    tango,
    tango_score,
    wilson,
)
from tests.eval import tango_reference


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 100), (3, 100), (50, 100), (330, 330), (17, 520)])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_equals_scipy(k: int, n: int, level: float) -> None:
    expected = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    assert wilson(k, n, level) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_limits_are_the_roots_of_the_score_equation() -> None:
    k, n, z = 8, 120, stats.norm.ppf(0.975)

    def distance(p: float) -> float:
        return float((k / n - p) ** 2 - z * z * p * (1 - p) / n)

    roots = optimize.brentq(distance, 1e-6, k / n), optimize.brentq(distance, k / n, 1 - 1e-6)
    assert wilson(k, n) == pytest.approx(roots, abs=1e-9)


def test_no_hits_in_100_prompts_still_allow_3_7_percent_and_in_330_1_2() -> None:
    assert round(100 * wilson(0, 100)[1], 1) == 3.7
    assert round(100 * wilson(0, 330)[1], 1) == 1.2
    assert wilson(0, 100)[0] == 0 and wilson(100, 100)[1] == 1


def test_nothing_asked_means_nothing_known() -> None:
    assert wilson(0, 0) == (0, 1) and bounds(0, 0, 0) == (0, 1)


def test_more_hits_than_prompts_are_refused() -> None:
    with pytest.raises(ResafeError, match="k = 5, n = 4"):
        wilson(5, 4)


def test_bounds_count_missing_verdicts_both_ways() -> None:
    assert bounds(10, 80, 100) == (0.1, 0.3)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 5), (3, 12), (40, 11), (0, 30)])
def test_mcnemar_is_twice_the_smaller_binomial_tail(b: int, c: int) -> None:
    tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c)
    assert mcnemar_exact(b, c) == pytest.approx(min(1.0, 2 * tail), abs=1e-9)


@pytest.mark.parametrize(
    ("table", "level", "low", "high"),
    [
        ((1, 7, 1, 12), 0.95, -0.517, -0.026),  # Bentur et al. 2009 in Fagerland et al. 2014, Statistics in Medicine 33:2850
        ((300, 25, 28, 265), 0.9, -0.0148, 0.0247),  # PropCIs::scoreci.mp(25, 28, 618, 0.9)
    ],
)
def test_tango_reproduces_published_intervals(
    table: tuple[int, int, int, int], level: float, low: float, high: float
) -> None:
    found = tango(Table(*table), level)
    digits = len(str(low).split(".")[1])
    assert (round(found.low, digits), round(found.high, digits)) == (low, high)


def test_tango_equals_maximised_likelihoods_on_every_table_of_12() -> None:
    for a, b, c in itertools.product(range(13), repeat=3):
        if (d := 12 - a - b - c) >= 0:
            found = tango(Table(a, b, c, d))
            assert found == pytest.approx(((c - b) / 12, *tango_reference.limits(b, c, 12)), abs=1e-9)


def test_the_score_of_no_difference_is_mcnemars() -> None:
    assert float(tango_score(3, 11, 40, 0)) == pytest.approx((11 - 3) / math.sqrt(14), abs=1e-12)
    assert tango_score([0, 0], [0, 0], 9, [0, 0.1]).tolist() == pytest.approx([0, tango_reference.score(0, 0, 9, 0.1)])


def test_a_paired_difference_is_after_minus_before() -> None:
    found = paired_difference([True, True, True, False], [False, False, True, False])
    assert found.difference == -0.5 and found.low < -0.5 < found.high


def test_swapping_before_and_after_mirrors_the_interval() -> None:
    before, after = [True] * 30 + [False] * 20, [True] * 10 + [False] * 35 + [True] * 5
    one, two = paired_difference(before, after), paired_difference(after, before)
    assert (one.low, one.high) == pytest.approx((-two.high, -two.low), abs=1e-12)


def test_pairs_of_different_length_are_refused() -> None:
    with pytest.raises(ResafeError, match="found 1 and 2"):
        crosstab([True], [True, False])


def test_no_pairs_have_no_difference() -> None:
    with pytest.raises(ResafeError, match="at least one pair"):
        paired_difference([], [])


def test_holm_by_hand() -> None:
    # sorted: .01 x 4, .02 x 3, .03 x 2 (lifted to .06), .9 x 1
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])


def test_holm_never_exceeds_one_and_keeps_ties_equal() -> None:
    assert holm([0.6, 0.6]) == [1.0, 1.0] and holm([]) == []


def test_utility_is_kept_only_if_the_whole_interval_is_within_the_margin() -> None:
    same = [True] * 1000
    assert non_inferior(same, same, margin=0.02) == "kept"
    assert non_inferior(same[:50], same[:50], margin=0.02) == "unclear"
    assert non_inferior(same, [True] * 800 + [False] * 200, margin=0.02) == "degraded"


def test_a_loss_that_chance_explains_is_unclear_not_degraded() -> None:
    before, after = [True] * 6 + [False] * 4, [False] * 2 + [True] * 4 + [True] + [False] * 3
    assert paired_difference(before, after).difference < -0.02
    assert non_inferior(before, after) == "unclear"


def test_for_over_refusal_lower_is_better() -> None:
    none, many = [False] * 1000, [True] * 200 + [False] * 800
    assert non_inferior(none, many, higher_is_better=False) == "degraded"
    assert non_inferior(many, none, higher_is_better=False) == "kept"


def test_power_equals_the_sum_over_all_discordant_tables() -> None:
    n, p10, p01 = 30, 0.3, 0.1
    total = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            if stats.binomtest(min(b, c), b + c, 0.5).pvalue <= 0.05 if b + c else False:
                ways = special.comb(n, b, exact=True) * special.comb(n - b, c, exact=True)
                total += ways * p10**b * p01**c * (1 - p10 - p01) ** (n - b - c)
    assert power_mcnemar(n, p10, p01) == pytest.approx(total, abs=1e-9)


def test_power_without_discordance_is_zero_and_impossible_probabilities_are_refused() -> None:
    assert power_mcnemar(100, 0.0, 0.0) == 0
    with pytest.raises(ResafeError, match="<= 1"):
        power_mcnemar(100, 0.7, 0.6)


def test_the_number_of_prompts_needed_is_where_power_is_reached() -> None:
    needed = prompts_needed(0.08, 0.03, 0.8)
    assert needed is not None
    assert power_mcnemar(needed, 0.08, 0.03) >= 0.8 > power_mcnemar(needed - 1, 0.08, 0.03)
    assert prompts_needed(0.05, 0.05) is None


def test_wilson_covers_on_average() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for p in rng.uniform(0.02, 0.98, 4000):
        low, high = wilson(int(rng.binomial(100, p)), 100)
        hits += low <= p <= high
    assert 0.93 <= hits / 4000 <= 0.97


def test_tango_covers_the_true_paired_difference() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(4000):
        cells = rng.dirichlet([1.5, 1, 1, 1.5])
        a, b, c, d = (float(x) for x in rng.multinomial(80, cells))
        found = tango(Table(a, b, c, d))
        hits += found.low <= cells[2] - cells[1] <= found.high
    assert 0.93 <= hits / 4000 <= 0.97


def test_the_bootstrap_covers_a_mean_of_clustered_rows_where_wilson_does_not() -> None:
    rng = np.random.default_rng(3)
    covered = naive = 0
    for trial in range(300):
        rates = rng.beta(2, 2, 60)
        votes = rng.random((60, 8)) < rates[:, None]
        labels = [i for i in range(60) for _ in range(8)]
        low, high = cluster_bootstrap(votes.ravel().tolist(), labels, seed=trial, resamples=400)
        covered += low <= 0.5 <= high
        low, high = wilson(int(votes.sum()), votes.size)
        naive += low <= 0.5 <= high
    assert 0.91 <= covered / 300 <= 0.98
    assert naive / 300 < 0.85


def test_crossed_clusters_are_wider_than_one_clustering() -> None:
    rng = np.random.default_rng(4)
    effect = rng.normal(0, 1, 6)
    values = [float(e + rng.normal(0, 0.1)) for _ in range(40) for e in effect]
    prompts, seeds = [i for i in range(40) for _ in range(6)], list(range(6)) * 40
    one, two = cluster_bootstrap(values, prompts), cluster_bootstrap(values, prompts, crossed=seeds)
    assert two[1] - two[0] > 3 * (one[1] - one[0])


def test_the_bootstrap_repeats_with_its_seed_and_wants_a_label_per_value() -> None:
    values, labels = [0.0, 1.0, 1.0, 0.0, 1.0], [0, 0, 1, 2, 3]
    assert cluster_bootstrap(values, labels, seed=5) == cluster_bootstrap(values, labels, seed=5)
    with pytest.raises(ResafeError, match="found 4 for 5"):
        cluster_bootstrap(values, labels[:4])


def test_kappa_by_hand() -> None:
    # 20 both yes, 5 and 10 split, 15 both no of 50: (0.7 - 0.5) / (1 - 0.5), Cohen's textbook table
    first = [True] * 25 + [False] * 25
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)


def test_kappa_is_undefined_where_both_judges_never_vary() -> None:
    assert cohen_kappa([False] * 9, [False] * 9) is None and cohen_kappa([], []) is None
