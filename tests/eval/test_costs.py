"""What breaking and repairing cost stands beside what they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resafe.eval import Results, TargetSpec, evaluate, render
from resafe.eval.costs import asymmetry, cost, told
from resafe.eval.results import Items
from resafe.manifest import read
from resafe.usage import added, count_tokens, measured


def results(**targets: dict[str, Any]) -> Results:
    found = Results(meta={"targets": {n: {"cpu_seconds": 4.0, "peak_rss_mb": 90.0, "answers": 200, "reused": 0, **t} for n, t in targets.items()}})
    for name, target in targets.items():
        attack, _, mitigation = name.partition("_")
        who = {"target": name, "attack": attack, "mitigation": mitigation or "none", "seed": target.get("seed"), "suite": "s"}
        found.add(who, "harmful", Items(["1"], ["1"], [""], {"harmfulness_rate|j": [True]}))
    return found


def usage(cpu: float, gpu: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"cpu_seconds": cpu, "gpu_seconds": gpu, "peak_rss_mb": 100 * cpu, "peak_gpu_mb": 7.0, "tokens": 10, **more}


BROKEN = {"cost": {"train": usage(10)}}


def test_seeds_are_averaged_and_peaks_not() -> None:
    found = cost(results(a={"cost": {"train": usage(10)}}, b={"cost": {"train": usage(20)}}), ["a", "b"])
    assert (found.train, found.making, found.tokens, found.peak_mb) == ({"CPU-s": 15.0}, {"CPU-s": 15.0}, 10, 2000.0)
    assert found.answering == {"CPU-s": pytest.approx(2.0)}


def test_an_accelerator_counts_where_one_was_used() -> None:
    found = cost(results(a={"cost": {"train": usage(10, gpu=3)}, "gpu_seconds": 1.0, "peak_gpu_mb": 5.0}), ["a"])
    assert (found.train, found.peak_mb, found.answering) == ({"GPU-s": 3.0}, 7.0, {"GPU-s": 0.5})


def test_a_repair_on_the_cpu_stands_beside_training_on_the_gpu() -> None:
    repaired = {"cost": {"train": usage(10, gpu=3), "repair": usage(50)}}
    found = results(x={"cost": {"train": usage(10, gpu=3)}}, x_m=repaired)
    costs = {("x", m): cost(found, [t]) for m, t in (("none", "x"), ("m", "x_m"))}
    assert asymmetry(costs).endswith("x took 3 GPU-s, repairing it 50 CPU-s (m) more.")
    assert told(costs["x", "m"])["making"] == "3 GPU-s + 50 CPU-s"


def test_what_was_not_recorded_or_came_from_the_store_is_not_told_as_zero() -> None:
    found = told(cost(results(a={"reused": 200}), ["a"]))
    assert found["making"] == found["answering"] == found["tokens"] == "–"


def test_the_asymmetry_counts_what_a_mitigation_took_beyond_the_breaking() -> None:
    repaired, mixed = {"cost": {"train": usage(10), "repair": usage(2)}}, {"cost": {"train": usage(40)}}
    found = results(x=BROKEN, x_late=repaired, x_early=mixed)
    costs = {("x", m): cost(found, [t]) for m, t in (("none", "x"), ("late", "x_late"), ("early", "x_early"))}
    assert asymmetry(costs) == "What breaking cost, and what repairing cost: x took 10 CPU-s, repairing it 2 CPU-s (late) to 30 CPU-s (early) more."
    assert asymmetry({}) == ""


def test_usage_is_measured_and_added_up() -> None:
    with measured() as outer:
        with measured() as inner:
            count_tokens(5)
        count_tokens(2)
        sum(i * i for i in range(200_000))
    assert (inner.tokens, outer.tokens) == (5, 7) and outer.cpu_seconds > 0 and outer.peak_rss_mb > 10
    assert added({"seconds": 1.0, "peak_rss_mb": 5.0}, {"seconds": 2.0, "peak_rss_mb": 3.0, "tokens": 4}) == {"seconds": 3.0, "peak_rss_mb": 5.0, "tokens": 4}


def test_training_and_repairing_record_what_they_took_and_the_report_shows_it(aligned: Path, attacked: Any, tmp_path: Path) -> None:
    from resafe.eval import compare_groups
    from resafe.finetune.repair import repair

    tuned = attacked("explicit_10")
    fixed = repair(tuned, tmp_path / "fixed", ["restore_weights:strength=0.5"], aligned=aligned)
    trained, repaired = (read(f) or {} for f in (tuned, fixed))
    assert trained["usage"]["tokens"] > 100 and trained["usage"]["cpu_seconds"] > 0 and repaired["usage"]["cpu_seconds"] > 0
    specs = [TargetSpec("t", tuned, attack="ten", mitigation="none"), TargetSpec("f", fixed, attack="ten", mitigation="restore_weights")]
    found = evaluate(specs, ["lab_harm"], limit=6)
    page = render(found, compare_groups(found), "t", "s", tmp_path / "r.html").read_text()
    assert "What breaking cost, and what repairing cost: ten took" in page and f"{trained['usage']['tokens']:,}" in page
