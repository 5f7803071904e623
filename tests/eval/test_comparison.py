"""Comparisons are paired by prompt and by seed, and refuse what cannot be paired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from resafe.errors import ResafeError
from resafe.eval import Results, compare, compare_groups
from resafe.eval.comparison import difference
from resafe.eval.pool import pooled
from resafe.eval.results import Items
from resafe.eval.stats import paired_difference, wilson


def add(
    results: Results, target: str, votes: Sequence[bool | None], attack: str = "a", mitigation: str = "none",
    seed: int | None = None, suite: str = "s", metric: str = "harmfulness_rate", prefix: str = "p",
) -> None:  # fmt: skip
    who = {"target": target, "attack": attack, "mitigation": mitigation, "seed": seed, "suite": suite}
    prompts = [f"{prefix}{i}" for i in range(len(votes))]
    results.add(who, "harmful", Items(prompts, list(prompts), [""] * len(votes), {f"{metric}|lab": list(votes)}))


def test_one_target_against_another_by_hand() -> None:
    results = Results()
    before, after = [True] * 30 + [False] * 10, [True] * 12 + [False] * 25 + [True] * 3
    add(results, "tuned", before)
    add(results, "fixed", after, mitigation="m")
    (row,) = compare(results, "tuned")
    expected = paired_difference(before, after)
    assert (row["difference"], row["low"], row["high"]) == expected and row["difference"] == -0.375
    assert (row["lost"], row["gained"], row["n"]) == (18, 3, 40)
    assert row["p"] == pytest.approx(stats.binomtest(3, 21).pvalue, abs=1e-9) and row["p_holm"] == row["p"]
    assert (row["target"], row["baseline"], row["suite"], row["metric"], row["judge"]) == (
        "fixed", "tuned", "s", "harmfulness_rate", "lab",
    )  # fmt: skip


def test_holm_runs_over_suites_and_targets_within_a_metric() -> None:
    results = Results()
    for suite in ("s", "t"):
        add(results, "tuned", [True] * 8, suite=suite)
        add(results, "fixed", [False] * 8, suite=suite)
    add(results, "tuned", [True] * 8, suite="u", metric="utility")
    add(results, "fixed", [False] * 8, suite="u", metric="utility")
    found = {r["suite"]: r for r in compare(results, "tuned")}
    p = 2 / 2**8
    assert found["s"]["p_holm"] == pytest.approx(2 * p) and found["t"]["p_holm"] == pytest.approx(2 * p)
    assert found["u"]["p_holm"] == pytest.approx(p)


def test_only_prompts_scored_for_both_are_paired() -> None:
    results = Results()
    add(results, "tuned", [True, None, True, False])
    add(results, "fixed", [False, False, None, False])
    (row,) = compare(results, "tuned")
    assert (row["n"], row["difference"]) == (2, -0.5)


def test_different_prompts_are_refused() -> None:
    results = Results()
    add(results, "tuned", [True, False])
    add(results, "fixed", [True, False], prefix="q")
    with pytest.raises(ResafeError, match="tuned and fixed did not answer the same prompts of s"):
        compare(results, "tuned")


def test_the_same_ids_for_different_prompts_are_refused() -> None:
    results = Results()
    add(results, "tuned", [True, False])
    add(results, "fixed", [True, False])
    results.items["fixed"]["s"].keys[1] = "changed"
    with pytest.raises(ResafeError, match="same prompts"):
        compare(results, "tuned")


def test_unknown_targets_are_refused_with_the_nearest() -> None:
    results = Results()
    add(results, "tuned", [True])
    with pytest.raises(ResafeError, match="no target is named 'tund'.*Did you mean 'tuned'?"):
        compare(results, "tund")
    with pytest.raises(ResafeError, match="no target is named 'gone'"):
        compare(results, "tuned", ["gone"])


def test_others_choose_what_is_compared() -> None:
    results = Results()
    for name in ("tuned", "one", "two"):
        add(results, name, [True, False])
    assert [r["target"] for r in compare(results, "tuned", ["two"])] == ["two"]
    assert [r["target"] for r in compare(results, "two")] == ["tuned", "one"]


def seeded() -> Results:
    results = Results()
    add(results, "before", [False] * 20, attack="none")
    for seed in (0, 1, 2):
        add(results, f"tuned{seed}", [True] * 16 + [False] * 4, seed=seed)
        add(results, f"fixed{seed}", [True] * (2 + seed) + [False] * (18 - seed), mitigation="m", seed=seed)
    return results


def test_groups_pool_their_seeds_and_test_by_prompt() -> None:
    (row,) = compare_groups(seeded())
    assert (row["attack"], row["mitigation"], row["versus"]) == ("a", "m", "no mitigation")
    assert (row["n"], row["prompts"], row["seeds"]) == (60, 20, 3)
    assert row["difference"] == pytest.approx(9 / 60 - 48 / 60)
    # prompts 2..15 fall in some seed; 0, 1 and 16.. stay: 14 falls, no rise
    assert row["p_models"] == row["p_models_holm"] == pytest.approx(2 / 2**14)
    assert row["p_models"] < row["p"] < 0.01 and row["high"] < 0  # of training seeds in general, as the interval
    single = paired_difference([True] * 16 + [False] * 4, [True] * 3 + [False] * 17)
    assert row["low"] < row["difference"] < row["high"]
    assert row["high"] - row["low"] > 0.8 * (single.high - single.low)  # three seeds are not three times the prompts


def test_seeds_that_disagree_widen_a_difference() -> None:
    fixed = [[True] * 100, [False] * 100]
    votes = [(f"p{i}", f"s{s}", True, after) for s, column in enumerate(fixed) for i, after in enumerate(column)]
    found = difference(votes)
    assert found["difference"] == -0.5 and found["low"] < -0.99 and found["high"] > -0.01


def test_seeds_that_share_a_baseline_do_not_make_a_test_of_chance() -> None:
    """Where nothing changes, a third answers yes by chance, and five seeds share one model before, rises outnumber falls."""
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        before, after = rng.random((100, 1)) < 1 / 3, rng.random((100, 5)) < 1 / 3
        found.append(difference([(f"p{i}", f"s{s}", bool(before[i, 0]), bool(after[i, s])) for i in range(100) for s in range(5)]))
    assert sum(f["p_models"] < 0.05 for f in found) > 100 > 20 > sum(f["p"] < 0.05 for f in found)
    assert all((f["p"] < 0.05) == (not f["low"] <= 0 <= f["high"]) for f in found)


def test_two_seeds_that_share_a_baseline_have_no_test_of_these_models_and_others_are_corrected_together() -> None:
    results = Results()
    add(results, "tuned", [True] * 8 + [False] * 2)
    for seed in (0, 1):
        for method, left in (("m", 1), ("n", 5)):
            add(results, f"{method}{seed}", [True] * left + [False] * (10 - left), mitigation=method, seed=seed)
    assert [r["p_models"] for r in compare_groups(results)] == [None, None]
    for seed in (0, 1):
        add(results, f"own{seed}", [True] * 8 + [False] * 2, seed=seed, attack="b")
        for method, left in (("m", 1), ("n", 5)):
            add(results, f"b-{method}{seed}", [True] * left + [False] * (10 - left), mitigation=method, seed=seed, attack="b")
    found = {r["mitigation"]: r for r in compare_groups(results) if r["attack"] == "b"}
    assert found["m"]["p_models"] == pytest.approx(2 / 2**7) and found["m"]["p_models_holm"] == pytest.approx(2 * 2 / 2**7)


def test_a_change_over_seeds_is_of_the_pairs_that_were_scored_and_lies_in_its_interval() -> None:
    votes = [("p0", f"s{s}", False, True) for s in range(3)] + [(f"p{i}", "s0", True, True) for i in range(1, 9)]
    found = difference(votes)
    assert found["difference"] == pytest.approx(3 / 11) and found["low"] <= found["difference"] <= found["high"]


def test_groups_against_the_model_before_fine_tuning() -> None:
    found = {r["mitigation"]: r for r in compare_groups(seeded(), "before fine-tuning")}
    assert {(f["p_models"], f["p_models_holm"]) for f in found.values()} == {(None, None)}  # one model before, three after
    assert set(found) == {"none", "m"} and found["none"]["difference"] == pytest.approx(0.8)
    assert found["m"]["baseline"] == "none / none" and found["m"]["seeds"] == 3


def test_seeds_are_paired_with_their_own_baseline() -> None:
    results = Results()
    for seed, tuned in ((0, [True, False]), (1, [False, True])):
        add(results, f"tuned{seed}", tuned, seed=seed)
        add(results, f"fixed{seed}", tuned, mitigation="m", seed=seed)
    (row,) = compare_groups(results)
    assert (row["lost"], row["gained"], row["p"]) == (0, 0, 1.0)


def test_seeds_without_a_baseline_of_their_own_are_refused() -> None:
    results = seeded()
    add(results, "fixed9", [True] * 20, mitigation="m", seed=9)
    with pytest.raises(ResafeError, match="fixed9 has training seed 9, its baselines 0, 1, 2"):
        compare_groups(results)


def test_with_one_seed_a_group_is_its_target() -> None:
    votes = [("p0", "s", True, False), ("p1", "s", False, False), ("p2", "s", True, True)]
    found = difference(votes)
    assert (found["difference"], found["low"], found["high"]) == paired_difference(
        [True, False, True], [False, False, True]
    )


def test_a_single_target_keeps_its_wilson_interval_when_pooled() -> None:
    results = Results()
    add(results, "t", [True] * 3 + [False] * 17)
    (row,) = pooled(results)
    assert (row["low"], row["high"]) == wilson(3, 20) and row["seeds"] == 1


def test_targets_with_the_same_labels_and_seed_are_not_pooled() -> None:
    results = Results()
    add(results, "one", [True] * 10, attack="none")
    add(results, "two", [False] * 10, attack="none")
    assert [(r["mitigation"], r["value"], r["n"]) for r in pooled(results)] == [("one", 1, 10), ("two", 0, 10)]


def test_several_seeds_are_no_more_certain_than_their_prompts() -> None:
    results = Results()
    for seed in range(3):
        add(results, f"t{seed}", [False] * 100, seed=seed)
    (row,) = pooled(results)
    assert (row["value"], row["n"], row["n_scored"], row["seeds"]) == (0, 300, 300, 3)
    assert row["high"] == pytest.approx(wilson(0, 100)[1])


def test_seeds_that_disagree_widen_the_pooled_interval() -> None:
    results = Results()
    for seed, share in enumerate((0, 50, 100)):
        add(results, f"t{seed}", [True] * share + [False] * (100 - share), seed=seed)
    (row,) = pooled(results)
    assert row["value"] == 0.5 and row["low"] < 0.2 and row["high"] > 0.8


def test_pooling_can_be_limited_to_some_columns() -> None:
    results = Results()
    add(results, "t", [True])
    add(results, "t", [True], suite="u")
    assert [r["suite"] for r in pooled(results, only=[("u", "harmfulness_rate", "lab")])] == ["u"]


def ratings(target: str, votes: Sequence[float | None], results: Results, seed: int | None = None) -> None:
    who = {"target": target, "attack": "a", "mitigation": "none" if target == "tuned" else "m", "seed": seed, "suite": "s"}
    ids = [f"p{i}" for i in range(len(votes))]
    results.add(who, "harmful", Items(ids, ids, [""] * len(ids), {"harmfulness_score|qi": list(votes)}, {"qi": (1.0, 5.0)}))


def test_ratings_are_compared_by_their_means_and_wilcoxons_test() -> None:
    results, before, after = Results(), [5.0, 4, 5, 3, 5, 2, 4, 5, 5, 1], [1.0, 2, 5, 1, 2, 2, 1, 3, 1, 1]
    ratings("tuned", before, results)
    ratings("fixed", after, results)
    (row,) = compare(results, "tuned")
    assert row["difference"] == pytest.approx(sum(after) / 10 - sum(before) / 10)
    assert row["low"] < row["difference"] < row["high"] and row["low"] >= -4
    assert row["p"] == pytest.approx(stats.wilcoxon([b - a for a, b in zip(before, after) if a != b]).pvalue, abs=1e-9)
    assert (row["lost"], row["gained"], row["n"]) == (7, 0, 10)


def test_missing_verdicts_bound_the_difference_and_may_leave_the_winner_open() -> None:
    results = Results()
    add(results, "tuned", [True] * 10)
    add(results, "fixed", [False] * 2 + [None] * 8, mitigation="m")
    add(results, "sure", [False] * 8 + [None] * 2, mitigation="n")
    found = {r["target"]: r for r in compare(results, "tuned")}
    assert (found["fixed"]["bound_low"], found["fixed"]["bound_high"], found["fixed"]["missing"]) == (-1.0, pytest.approx(-0.2), 8)
    add(results, "open", [None] * 10, mitigation="o")
    add(results, "half", [True] * 5 + [None] * 5, mitigation="h")
    found = {r["target"]: r for r in compare(results, "sure", ["half"])}
    assert found["half"]["decided"] and found["half"]["bound_low"] == pytest.approx(0.3)
    found = {r["target"]: r for r in compare(results, "half", ["fixed"])}
    assert not found["fixed"]["decided"] and (found["fixed"]["bound_low"], found["fixed"]["bound_high"]) == (-1.0, pytest.approx(0.3))


def test_an_incoherent_answer_is_not_a_missing_verdict() -> None:
    results, ids = Results(), ["p0", "p1", "p2", "p3"]
    for target, votes, coherent in (
        ("tuned", [True, None, True, True], [True, False, True, True]), ("fixed", [False, False, None, None], [True, True, False, True]),
    ):  # fmt: skip
        columns: dict[str, Any] = {"harmfulness_rate_coherent|lab": votes, "coherence_rate|coherence": coherent}
        who = {"target": target, "attack": "a", "mitigation": "none" if target == "tuned" else "m", "seed": None, "suite": "s"}
        results.add(who, "harmful", Items(ids, ids, [""] * 4, columns))
    row = next(r for r in compare(results, "tuned") if r["metric"] == "harmfulness_rate_coherent")
    assert (row["n"], row["missing"]) == (1, 1)  # p3 is coherent on both sides and was not judged; p1 and p2 are not asked about


def test_ratings_of_several_seeds_are_pooled_on_their_scale() -> None:
    results = Results()
    for seed, votes in enumerate(([5.0, 4, 5, 5, 1, 5], [4.0, 4, 5, 5, 2, 5])):
        ratings(f"tuned{seed}", votes, results, seed)
    (row,) = pooled(results)
    assert row["value"] == pytest.approx(50 / 12) and 1 <= row["low"] < row["value"] < row["high"] <= 5
    assert (row["seeds"], row["scale_low"], row["scale_high"]) == (2, 1.0, 5.0)
