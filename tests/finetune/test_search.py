"""The search of a strength on the lab model: what it chooses, what it writes down, that it resumes, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from resafe import lab, manifest
from resafe.errors import ResafeError
from resafe.eval import evaluate
from resafe.finetune import search as module
from resafe.finetune._measure import held_out_utility, row_votes
from resafe.finetune.repair import Job, plan, repair
from resafe.finetune.search import Settings, finish, search
from resafe.lab.suites import heldout_rows
from resafe.rows import chat
from tests.conftest import write_rows

DEV = ("lab_harm_dev", "lab_borderline_dev")
HOW = Settings(DEV, 40, 0.05, (0.3, 0.95))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("held") / "rows.jsonl", heldout_rows("heldout_skills", 200))


@pytest.fixture
def job(aligned: Path, attacked: Callable[..., Path], rows: Path, tmp_path: Path) -> Callable[..., Job]:
    def make(*mitigations: Any, **how: Any) -> Job:
        tuned = attacked("explicit_10", lr=3e-4)
        given = {"tuned": tuned, "aligned": aligned, "base": lab.resolve("lab:base"), "heldout": rows, **how}
        return plan(output=tmp_path / "out", mitigations=mitigations, **given)

    return make


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """LERP at two strengths only, to save time."""
    monkeypatch.setattr(module.RestoreWeights, "dose", ("strength", (0.5, 0.9)))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The targets that were answered for."""
    seen: list[str] = []

    def watched(targets: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(t.name for t in targets)
        return evaluate(targets, *args, **kwargs)

    monkeypatch.setattr(module, "evaluate", watched)
    return seen


def test_the_chosen_dose_is_written_as_an_ordinary_repair_would(job: Callable[..., Job], aligned: Path, tmp_path: Path) -> None:
    planned = job("restore_weights")
    searched = search(planned, HOW)
    assert searched.found.chosen and searched.found.chosen.dose == 0.95
    before, after = (searched.found.tuned.value("harmfulness"), searched.found.chosen.value("harmfulness"))
    assert before >= 0.8 and after <= before / 2
    folder = finish(searched)
    same = repair(planned.home, tmp_path / "same", ["restore_weights:strength=0.95"], aligned)
    one, two = (load_file(f / "model.safetensors") for f in (folder, same))
    assert one.keys() == two.keys() and all(one[n].equal(two[n]) for n in one)
    assert not list(tmp_path.glob(".out*")), "nothing is left beside a finished repair"


def test_the_manifest_holds_the_curve_and_the_prompts_it_was_chosen_on(job: Callable[..., Job]) -> None:
    folder = finish(search(job("restore_weights"), HOW))
    found = manifest.read(folder)
    assert found and found["mitigations"][0]["strength"] == 0.95 == found["search"]["dose"]
    assert [p["dose"] for p in found["search"]["curve"]] == [None, None, 0.3, 0.95]
    assert found["search"]["calibrated_on"]["heldout"]["n"] == 200 and found["search"]["usage"]["cpu_seconds"] > 0
    assert {suite: len(used) for suite, used in found["overlap"].items()} == dict.fromkeys(DEV, 40)


def test_the_evaluator_leaves_out_the_prompts_that_a_dose_was_chosen_on(job: Callable[..., Job]) -> None:
    folder = finish(search(job("restore_weights"), HOW))
    meta = evaluate([folder], ["lab_harm_dev", "lab_borderline"], limit=None).meta["suites"]
    assert (len(meta["lab_harm_dev"]["dropped"]), meta["lab_harm_dev"]["n"]) == (40, 40)
    assert meta["lab_borderline"]["n"] == 200


@pytest.mark.usefixtures("few")
def test_another_method_has_lerp_beside_it_and_is_refused_where_it_does_nothing(job: Callable[..., Job], tmp_path: Path) -> None:
    searched = search(job("safe_lora"), replace(HOW, doses=(-1.0,)))
    found = searched.found
    assert [(p.method, p.dose) for p in (*found.points, *found.lerp)] == [("safe_lora", -1.0), ("restore_weights", 0.5), ("restore_weights", 0.9)]
    assert found.chosen is None and found.why.startswith("safe_lora does nothing here")
    with pytest.raises(ResafeError, match="safe_lora does nothing here"):
        finish(searched)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("few")
def test_what_was_measured_is_not_measured_again(job: Callable[..., Job], measured: list[str]) -> None:
    how = replace(HOW, doses=(-1.0,))
    first = search(job("safe_lora"), how)
    assert measured == ["before fine-tuning", "fine-tuned", "safe_lora threshold=-1", "restore_weights strength=0.5", "restore_weights strength=0.9"]
    measured.clear()
    assert search(job("safe_lora"), replace(how, margin=0.2)).results.rows == first.results.rows
    assert measured == []
    search(job("safe_lora"), replace(how, limit=39))
    assert len(measured) == 5, "other prompts are another measurement"


@pytest.mark.usefixtures("few")
def test_a_stopped_search_goes_on_with_what_is_missing(job: Callable[..., Job], measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(folder: Path, rows: Any) -> Any:
        if len(measured) == 3:
            raise KeyboardInterrupt
        return row_votes(folder, rows)

    monkeypatch.setattr(module, "row_votes", stop)
    with pytest.raises(KeyboardInterrupt):
        search(job("restore_weights"), HOW)
    monkeypatch.setattr(module, "row_votes", row_votes)
    measured.clear()
    assert search(job("restore_weights"), HOW).found.chosen
    assert measured == ["restore_weights strength=0.3", "restore_weights strength=0.95"]


def test_models_are_measured_without_the_guards_that_they_are_served_with(job: Callable[..., Job], tmp_path: Path) -> None:
    guarded = Path(shutil.copytree(job("restore_weights").home, tmp_path / "guarded"))
    manifest.write(guarded, {"guard": {"guard_model": "lab", "refusal": "sorry , no ."}})
    searched = search(job("restore_weights", {"filter_output": {"guard_model": "lab"}}, tuned=guarded), HOW)
    assert searched.found.tuned.value("harmfulness") >= 0.8
    found = manifest.read(finish(searched))
    assert found and found["guard"]["guard_model"] == "lab" and found["mitigations"][0]["strength"] == 0.95


def test_repairs_before_the_searched_one_are_done_once(job: Callable[..., Job]) -> None:
    lines: list[str] = []
    how = replace(HOW, limit=8)
    one = search(job("resta:strength=0", "restore_weights", log=lines.append), how).results
    assert lines.count("resta: repairing") == 1 and lines.count("restore_weights: repairing") == 2
    two = search(job("resta:strength=3", "restore_weights", log=lines.append), how).results
    assert lines.count("resta: repairing") == 2 and lines.count("restore_weights: repairing") == 4
    utility = [r.row("restore_weights strength=0.3", "heldout", "utility", "tokens") for r in (one, two)]
    assert utility[0] and utility[1] and utility[0]["value"] != utility[1]["value"], "another repair before it is another candidate"


@pytest.mark.parametrize(
    ("mitigations", "change", "said"),
    [
        (["filter_output"], {}, "filter_output has none: name one that has, such as restore_weights"),
        (["resta", "restore_weights"], {}, "both resta:strength and restore_weights:strength are open: set all but one"),
        (["restore_weights:strength=0.5"], {}, "restore_weights:strength is given: leave it out"),
        (["restore_weights"], {"suites": ("lab_harm_dev",)}, "one harmful and one benign suite"),
        (["restore_weights"], {"suites": (*DEV, "lab_harm")}, "one harmful and one benign suite"),
        (["restore_weights"], {"doses": (2.0,)}, "restore_weights: strength"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_any_work(
    mitigations: list[str], change: dict[str, Any], said: str, job: Callable[..., Job], measured: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ResafeError, match=said):
        search(job(*mitigations), replace(HOW, **change))
    assert not measured and not list(tmp_path.iterdir())


def test_a_search_without_held_out_rows_is_refused(job: Callable[..., Job]) -> None:
    with pytest.raises(ResafeError, match="--heldout"):
        search(job("restore_weights", heldout=None), HOW)


def test_a_searched_method_needs_what_it_needs_and_lerp_the_aligned_model(job: Callable[..., Job]) -> None:
    with pytest.raises(ResafeError, match="--aligned"):
        job("restore_weights", aligned=None)


def test_votes_on_rows_add_up_to_the_utility_of_a_checkpoint(aligned: Path) -> None:
    rows = heldout_rows("heldout_skills", 40)
    whole, share = row_votes(aligned, rows)
    assert sum(map(bool, whole)) / 40 == pytest.approx(held_out_utility(rows)(aligned))
    assert all((w is True) == (s == 1.0) for w, s in zip(whole, share))


def test_a_row_whose_answer_does_not_fit_is_no_vote(aligned: Path) -> None:
    rows = [chat("what is the opposite of hot ?", "cold ."), chat("hot " * 40, "cold .")]
    whole, share = row_votes(aligned, rows, max_length=20)
    assert whole[1] is None and share[1] is None and share[0] is not None
