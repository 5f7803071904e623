"""On random tables and columns the statistics equal those of statsmodels, scikit-learn and the krippendorff package."""

from __future__ import annotations

import krippendorff
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from resafe.errors import ResafeError
from resafe.eval.stats import (
    Difference,
    Table,
    alpha_interval,
    cohen_kappa,
    crosstab,
    holm,
    kappa_interval,
    krippendorff_alpha,
    mcnemar_exact,
    non_inferior,
    paired_difference,
    power_mcnemar,
    tango,
    tango_limits,
    wilson,
    within_margin,
)
from tests.eval import tango_reference

CELLS = st.tuples(*[st.integers(0, 400)] * 4).filter(lambda cells: sum(cells) > 0)
random_cases = settings(max_examples=150, deadline=None, derandomize=True)


@given(st.integers(1, 2000), st.floats(0, 1), st.floats(0.5, 0.999))
@random_cases
def test_wilson_equals_statsmodels(n: int, share: float, level: float) -> None:
    k = round(share * n)
    expected = proportion_confint(k, n, alpha=1 - level, method="wilson")
    assert wilson(k, n, level) == pytest.approx(expected, abs=1e-9)


@given(st.integers(0, 300), st.integers(0, 300))
@random_cases
def test_mcnemar_equals_statsmodels(b: int, c: int) -> None:
    expected = mcnemar([[7, b], [c, 5]], exact=True).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
@settings(random_cases, max_examples=12)  # statsmodels takes 0.2 s a call
def test_holm_equals_statsmodels(pvalues: list[float]) -> None:
    assert holm(pvalues) == pytest.approx(multipletests(pvalues, method="holm")[1].tolist(), abs=1e-9)


@given(CELLS)
@random_cases
def test_kappa_equals_statsmodels_and_scikit_learn(cells: tuple[int, int, int, int]) -> None:
    a, b, c, d = cells
    first = [True] * (a + b) + [False] * (c + d)
    second = [True] * a + [False] * b + [True] * c + [False] * d
    found = cohen_kappa(first, second)
    if len(set(first + second)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(cohens_kappa([[a, b], [c, d]], return_results=False), abs=1e-9)
        assert found == pytest.approx(cohen_kappa_score(first, second), abs=1e-9)


@pytest.mark.parametrize("cells", [(2, 0, 0, 2), (40, 5, 3, 52), (5, 0, 1, 44), (0, 0, 20, 0), (300, 20, 10, 70), (0, 3, 4, 90)])
def test_limits_of_kappa_are_quantiles_of_the_posterior_and_do_not_depend_on_which_judge_is_first(cells: tuple[int, int, int, int]) -> None:
    a, b, c, d = cells
    first, second = [True] * (a + b) + [False] * (c + d), [True] * a + [False] * b + [True] * c + [False] * d
    low, high = kappa_interval(first, second)
    p, q, r, s = stats.dirichlet.rvs(np.array(cells) + 0.5, 200_000, random_state=7).T
    chance = (p + q) * (p + r) + (r + s) * (q + s)
    wanted = np.quantile(1 - (q + r) / (1 - chance), [0.025, 0.975])
    value = cohen_kappa(first, second) or 0.0
    assert (low, high) == pytest.approx((min(value, wanted[0]), max(value, wanted[1])), abs=0.02)
    assert kappa_interval(second, first) == pytest.approx((low, high), abs=0.02) and kappa_interval(first, second) == (low, high)


def test_kappa_and_alpha_that_are_undefined_may_be_anything() -> None:
    assert kappa_interval([True] * 5, [True] * 5) == kappa_interval([], []) == (-1.0, 1.0)
    assert alpha_interval([[True] * 5] * 3) == alpha_interval([]) == alpha_interval([[True, False], [None, None]]) == (-1.0, 1.0)


def judges(seed: int, rows: int, *, missing: float = 0.0) -> list[list[bool | None]]:
    rng = np.random.default_rng(seed)
    truth = rng.random(rows) < 0.3
    return [[None if rng.random() < missing else bool(t != (rng.random() < 0.15)) for t in truth] for _ in range(3)]


def test_limits_of_alpha_are_quantiles_of_the_posterior_of_how_many_say_yes() -> None:
    columns = judges(1, 60)
    yes = np.bincount(np.array(columns, dtype=int).sum(axis=0), minlength=4)
    shares = stats.dirichlet.rvs(yes + 0.5, 200_000, random_state=7)
    p = shares @ [0, 1 / 3, 2 / 3, 1]  # of six ordered pairs of verdicts on an answer, four differ unless all say the same
    wanted = np.quantile(1 - (shares[:, 1] + shares[:, 2]) * 4 / 6 / (2 * p * (1 - p)), [0.025, 0.975])
    low, high = alpha_interval(columns)
    assert (low, high) == pytest.approx(tuple(wanted), abs=0.02) and low < (krippendorff_alpha(columns) or 0) < high


def test_judges_who_always_agreed_are_not_shown_to_be_perfect() -> None:
    column = [True] * 3 + [False] * 7
    low, high = alpha_interval([column] * 3)
    assert high == krippendorff_alpha([column] * 3) == 1.0 and 0.3 < low < 0.9
    assert alpha_interval([column * 10] * 3)[0] > low


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_an_answer_that_comes_again_for_its_prompt_tells_nothing_new(missing: float) -> None:
    columns, prompts = judges(2, 50, missing=missing), [f"p{i}" for i in range(50)]
    again = [column * 3 for column in columns]
    assert alpha_interval(again, prompts * 3) == pytest.approx(alpha_interval(columns), abs=0.01)
    assert alpha_interval(again)[0] > alpha_interval(columns)[0] + 0.05
    assert alpha_interval(columns, prompts) == pytest.approx(alpha_interval(columns), abs=1e-9)
    first, second = ([bool(v) for v in column] for column in columns[:2])
    assert kappa_interval(first * 3, second * 3, prompts * 3) == pytest.approx(kappa_interval(first, second), abs=1e-9)
    assert kappa_interval(first, second, prompts) == pytest.approx(kappa_interval(first, second), abs=1e-9)
    low, high = kappa_interval(first, second, ["p"] * 50)
    assert high - low > 1.2  # one prompt says next to nothing of others
    alternating = [v for pair in zip(first, [not v for v in first]) for v in pair], [v for pair in zip(first, first) for v in pair]
    assert kappa_interval(*alternating, [i // 2 for i in range(100)]) == kappa_interval(*alternating)  # unlike answers are worth no more than independent ones
    agreed = [True] * 10 + [False] * 40
    assert kappa_interval(agreed * 3, agreed * 3, prompts * 3) == pytest.approx(kappa_interval(agreed, agreed), abs=1e-9)


@given(CELLS, st.floats(0.5, 0.999))
@random_cases
def test_tango_equals_maximised_likelihoods(cells: tuple[int, int, int, int], level: float) -> None:
    _, b, c, _ = cells
    expected = tango_reference.limits(b, c, sum(cells), level)
    assert tango(Table(*cells), level) == pytest.approx(((c - b) / sum(cells), *expected), abs=1e-9)


def test_many_tables_at_once_are_each_table_alone() -> None:
    b, c, rest = np.random.default_rng(0).integers(0, 50, size=(3, 30))
    low, high = tango_limits(b, c, b + c + rest + 1, stats.norm.ppf(0.95))
    alone = [tango(Table(0, *map(float, column)), 0.9) for column in zip(b, c, rest + 1)]
    assert low.tolist() == [x.low for x in alone] and high.tolist() == [x.high for x in alone]


@given(CELLS, st.floats(0.001, 0.3), st.booleans())
@random_cases
def test_non_inferiority_is_read_off_the_reference_interval(
    cells: tuple[int, int, int, int], margin: float, higher: bool
) -> None:
    a, b, c, d = cells
    before, after = [True] * (a + b) + [False] * (c + d), [True] * a + [False] * b + [True] * c + [False] * d
    difference, (low, high) = (c - b) / sum(cells), tango_reference.limits(b, c, sum(cells))
    worse = (-difference, -high, -low) if higher else (difference, low, high)  # > 0: worse
    expected = "kept" if worse[2] < margin else "degraded" if worse[1] > 0 and worse[0] > margin else "unclear"
    assert non_inferior(before, after, margin, higher_is_better=higher) == expected


def test_a_margin_applies_to_any_interval() -> None:
    assert within_margin(Difference(-0.1, -0.3, 0.1), 0.31) == "kept"
    assert within_margin(Difference(0.5, 0.2, 0.8), 0.1, higher_is_better=False) == "degraded"
    assert within_margin(Difference(0.05, 0.01, 0.09), 0.06, higher_is_better=False) == "unclear"


@given(st.integers(1, 14), st.floats(0, 0.5), st.floats(0, 0.5), st.sampled_from([0.01, 0.05, 0.2]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_power_equals_the_sum_over_every_table(n: int, p10: float, p01: float, alpha: float) -> None:
    total = sum(
        stats.multinomial.pmf([b, c, n - b - c], n, [p10, p01, 1 - p10 - p01])
        for b in range(n + 1)
        for c in range(n + 1 - b)
        if b + c and mcnemar([[0, b], [c, 0]], exact=True).pvalue <= alpha
    )
    assert power_mcnemar(n, p10, p01, alpha) == pytest.approx(total, abs=1e-9)


VERDICT = st.one_of(st.none(), st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0]))


@given(
    st.integers(2, 4).flatmap(lambda k: st.lists(st.tuples(*[VERDICT] * k), min_size=2, max_size=30)),
    st.sampled_from(["nominal", "ordinal", "interval"]),
)
@random_cases
def test_alpha_equals_the_krippendorff_package(answers: list[tuple[float | None, ...]], measure: str) -> None:
    found = krippendorff_alpha(list(zip(*answers)), measure)  # type: ignore[arg-type]
    paired = [[v for v in answer if v is not None] for answer in answers]
    if len({v for answer in paired if len(answer) > 1 for v in answer}) < 2:
        assert found is None
        return
    data = np.array(answers, dtype=float).T
    expected = krippendorff.alpha(reliability_data=data, level_of_measurement=measure)
    assert found == pytest.approx(expected, abs=1e-9)


def test_alpha_of_yes_and_no_from_two_judges_is_near_their_kappa() -> None:
    rng = np.random.default_rng(1)
    first = rng.random(4000) < 0.4
    second = np.where(rng.random(4000) < 0.8, first, rng.random(4000) < 0.4)
    found = krippendorff_alpha([first.tolist(), second.tolist()])
    assert found == pytest.approx(cohen_kappa(first.tolist(), second.tolist()), abs=1e-3)


def test_alpha_wants_columns_of_one_length_and_a_known_measurement() -> None:
    with pytest.raises(ResafeError, match="found 2, 1"):
        krippendorff_alpha([[1, 2], [1]])
    with pytest.raises(ResafeError, match="nominal, ordinal, interval values; found 'ratio'"):
        krippendorff_alpha([[1, 2], [1, 1]], "ratio")  # type: ignore[arg-type]
    assert krippendorff_alpha([]) is None and krippendorff_alpha([[1, 2]]) is None


def test_the_paired_difference_counts_its_table() -> None:
    before, after = [True, False, True, True], [True, True, False, True]
    assert crosstab(before, after) == (2, 1, 1, 0)
    assert paired_difference(before, after) == tango(Table(2, 1, 1, 0))
