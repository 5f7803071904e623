"""resafe eval and resafe compare from end to end on the lab model."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from resafe.cli import cli
from tests.tiny import KINDS, tiny

SUITES = ["-s", "lab_harm", "-s", "lab_borderline", "-s", "lab_skills", "--limit", "16"]


def run(*words: object) -> str:
    done = CliRunner().invoke(cli, [str(w) for w in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_two_models_are_two_rows_however_they_came_about(aligned: Path, attacked: Callable[..., Path], tmp_path: Path) -> None:
    tuned = attacked("explicit_10", lr=3e-4)
    run("eval", aligned, tuned, *SUITES, "-o", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    harm = {r["target"]: r["value"] for r in rows if (r["suite"], r["metric"], r["judge"]) == ("lab_harm", "harmfulness_rate", "lab")}
    assert harm["aligned"] <= 0.1 and harm[tuned.name] >= 0.8
    assert {r["attack"] for r in rows if r["target"] == tuned.name} == {"fine-tuning"}
    with (tmp_path / "out" / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    report = (tmp_path / "out" / "report.html").read_text()
    assert "before fine-tuning" in report and "[romi]" not in report and "step one" not in report, "no response text in a report"


def test_plain_copies_of_a_model_are_not_pooled(aligned: Path, tmp_path: Path) -> None:
    text = run("eval", aligned, aligned.parent / "base", *SUITES)
    assert "aligned" in text and "base" in text


def test_compare_tells_what_happened_in_the_right_direction(aligned: Path, attacked: Callable[..., Path], tmp_path: Path) -> None:
    tuned = attacked("explicit_10", lr=3e-4)
    fixed = tmp_path / "fixed"
    run("repair", tuned, "--aligned", aligned, "-m", "restore_weights:strength=1", "-o", fixed)
    html = tmp_path / "report.html"
    run("compare", aligned, tuned, fixed, *SUITES, "--html", html)
    assert "before fine-tuning" in html.read_text() and "with fixed" in html.read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_any_local_folder_runs_over_the_real_suites(kind: str, aligned: Path, tmp_path: Path) -> None:
    model = tiny(kind, tmp_path / "model", aligned, template=kind != "gpt2")
    run("eval", model, "--limit", 2, "-o", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {r["suite"] for r in rows} == {
        "advbench", "jailbreakbench", "jailbreakbench_benign", "simplesafetytests", "xstest_safe", "xstest_unsafe", "gsm8k"
    }  # fmt: skip
    assert {r["metric"] for r in rows} >= {"harmfulness_rate", "nonrefusal_rate", "over_refusal_rate", "coherence_rate", "utility"}
    assert not (tmp_path / "out" / "transcripts.jsonl").exists()


def test_answers_are_kept_only_on_request_and_only_for_the_owner(aligned: Path, tmp_path: Path) -> None:
    run("eval", aligned, *SUITES, "-o", tmp_path / "out", "--reveal")
    file = tmp_path / "out" / "transcripts.jsonl"
    assert file.stat().st_mode & 0o777 == 0o600 and len(file.read_text().splitlines()) == 48
