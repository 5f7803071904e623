"""The intervals hold the truth as often as they promise: exact sums, small simulations, and the committed measurement."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.coverage import (
    RESULT,
    clustered,
    clustered_changes,
    exact_paired,
    exact_wilson,
    moved_columns,
    seeded,
    simulated_categories,
    simulated_difference,
    simulated_mean,
    simulated_rare_changes,
    simulated_seed_changes,
    simulated_seeds,
    summary,
    tango,
)


def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text())
    return found


def test_wilson_covers_95_percent_on_average_and_the_committed_sums_are_these() -> None:
    points = list(exact_wilson())
    found = summary(points)
    assert 0.945 < found["mean"] < 0.96 and found["min"] > 0.91
    assert [p["coverage"] for p in committed()["wilson"]["points"]] == pytest.approx([p["coverage"] for p in points])


def test_tango_covers_95_percent_on_average_and_the_committed_sums_are_these() -> None:
    points = list(exact_paired(tango, sizes=(50, 100)))
    found = summary(points)
    assert 0.945 < found["mean_from_5_expected"] < 0.955 and found["min"] > 0.935
    kept = [p["coverage"] for p in committed()["tango"]["points"] if p["n"] <= 100]
    assert kept == pytest.approx([p["coverage"] for p in points], abs=1e-5)


def test_means_of_ratings_and_shares_are_covered() -> None:
    found = summary(list(simulated_mean(200, (50, 330))))
    assert 0.945 < found["mean"] < 0.975 and found["min"] > 0.88


def test_differences_of_ratings_and_shares_are_covered() -> None:
    found = summary(list(simulated_difference(200, moved_columns((50, 330)))))
    assert 0.95 < found["mean"] < 0.99 and found["min"] > 0.88


def test_a_rate_over_three_or_five_seeds_is_covered_also_where_seeds_differ() -> None:
    points = [p for p in simulated_seeds(clustered, 80, seeded((100,))) if p["seeds"] > 2]
    assert 0.925 < summary(points)["mean"] < 0.985
    assert summary([p for p in points if p["seed_spread"] == 1])["mean"] > 0.9


def test_a_change_over_three_or_five_seeds_is_covered_also_where_seeds_differ() -> None:
    points = [p for p in simulated_seed_changes(clustered_changes, 80, seeded((100,))) if p["seeds"] > 2]
    assert 0.93 < summary(points)["mean"] < 0.99


def test_few_categories_are_covered_where_a_bootstrap_of_them_is_not() -> None:
    few = [p for p in simulated_categories(60, (100,)) if p["categories"] <= 5]
    resampled = [p for p in simulated_categories(60, (100,), method="bootstrap") if p["categories"] <= 5]
    assert summary(few)["mean"] > 0.93 and summary(resampled)["mean"] < 0.87


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("wilson", 0.96),
        ("tango", 0.96),
        ("mean_interval", 0.96),
        ("mean_interval, drawn", 0.96),
        ("paired_mean_difference", 0.972),  # fewer than five changes: see below
        ("paired_mean_difference, drawn", 0.96),
        ("clustered_interval, seeds", 0.96),
        ("clustered_interval, seeds drawn", 0.96),
        ("clustered_interval, changes over seeds drawn", 0.96),
        ("clustered_interval, changes over seeds", 0.9605),
        ("clustered_interval, categories", 0.96),
        ("clustered_interval, categories drawn afterwards", 0.96),
    ],
)
def test_the_committed_averages_are_near_95_percent_and_not_below(name: str, most: float) -> None:
    assert 0.94 <= committed()[name]["mean"] <= most


@pytest.mark.parametrize("name", ["wilson", "tango", "mean_interval", "mean_interval, drawn", "paired_mean_difference", "paired_mean_difference, drawn"])
def test_from_five_expected_events_the_committed_averages_are_within_94_and_96_percent(name: str) -> None:
    assert 0.94 <= committed()[name]["mean_from_5_expected"] <= 0.96


def test_a_rare_change_unlike_the_others_is_covered() -> None:
    """A rule that takes unseen changes to be like those that were seen falls to 35 % here."""
    assert committed()["paired_mean_difference, rare changes"]["min"] > 0.9
    assert summary(list(simulated_rare_changes(60, (50,))))["min"] > 0.8


def test_the_committed_bootstraps_miss_the_mean_of_rare_ratings() -> None:
    assert committed()["alternative: percentile bootstrap of a mean"]["min"] < 0.6
    assert committed()["mean_interval"]["min"] > 0.93
