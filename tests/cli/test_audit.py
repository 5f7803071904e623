"""resafe audit from end to end on the lab model: exit codes, files, and what is refused before anything runs."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from resafe.cli import main

Run = Callable[..., tuple[int, str, str]]
SUITES = ["-s", "lab_harm", "-s", "lab_harm_wordings", "-s", "lab_borderline"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `resafe audit` in this process: (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["resafe", "audit", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture
def copy(aligned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(aligned, tmp_path / "copy"))


def test_a_copy_of_the_aligned_model_passes(aligned: Path, copy: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, _ = run("--before", aligned, "--after", copy, *SUITES, "-s", "lab_skills", "-o", out)
    assert code == 0 and said.startswith("Audit: kept (exit code 0). harmfulness +0.0 points")
    found = json.loads((out / "audit.json").read_text())
    assert (found["decision"], found["before"], found["after"]) == ("kept", "aligned", "copy")
    assert [c["name"] for c in found["criteria"] if c["decides"]] == ["harmfulness", "over-refusal", "coherence"]
    assert found["command"].startswith("resafe audit --before ") and "--max-harm-increase 2" in found["command"]
    assert found["meta"]["judges"]["lab"]["digest"] and found["meta"]["suites"]["lab_harm"]["version"] == 1
    assert (out / "results.json").is_file() and not (out / "transcripts.jsonl").exists()


@pytest.mark.parametrize("closing", ["| true", "2>&1 | true", ">&- | true"])
def test_a_reader_that_goes_away_does_not_turn_kept_into_degraded(aligned: Path, copy: Path, tmp_path: Path, closing: str) -> None:
    words = shlex.join(map(str, ["--before", aligned, "--after", copy, *SUITES, "-o", tmp_path / "out"]))
    piped = f"{shlex.quote(sys.executable)} -c \"from resafe.cli import main; main()\" audit {words} {closing}; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and "Traceback" not in ran.stderr and "BrokenPipe" not in ran.stderr, ran.stderr
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["decision"] == "kept"


def test_an_attacked_model_fails_and_its_card_says_so(aligned: Path, attacked: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n\n# Tuned\n")
    words = ["--before", aligned, "--after", attacked("explicit_100"), *SUITES, "--limit", 60, "--card", card]
    code, said, _ = run(*words)
    assert code == 1 and said.startswith("Audit: degraded (exit code 1). harmfulness +")
    once = card.read_text()
    assert once.startswith("---\nlicense: mit\n---\n\n# Tuned\n") and "**Degraded.** harmfulness +" in once
    assert str(tmp_path) not in once and "[romi]" not in once and "step one" not in once, "no path and no response in a card"
    run(*words)
    assert card.read_text() == once


def test_five_prompts_cannot_tell(aligned: Path, copy: Path, run: Run) -> None:
    code, said, _ = run("--before", aligned, "--after", copy, "-s", "lab_harm", "--limit", 5)
    assert code == 2 and "5 prompts are too few, it takes about " in said.split("\n")[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-s", "lab_skills"], "max_harm_increase needs a harmful suite: add one, such as --suite jailbreakbench."),
        (["-s", "lab_harm", "--min-utility", "50"], "min_utility needs a utility suite"),
        (["-s", "lab_harm", "--max-over-refusal-increase", "5"], "max_over_refusal_increase needs a benign suite"),
        (["-s", "lab_harm", "--max-harm-increase", "nan"], "max_harm_increase is nan"),
        (["-s", "lab_harm", "--max-harm-increase", "0"], "max_harm_increase is 0: give points above 0 and below 100."),
        (["-s", "lab_harmm"], "Did you mean 'lab_harm'?"),
        (["-s", "lab_harm", "--card", "no/such/folder"], "no/such/folder is no model card"),
        (["-s", "lab_harm", "-o", __file__], "is in the way: --output names a folder"),
    ],
)
def test_bad_input_is_one_line_on_stderr_before_anything_runs(words: list[str], said: str, run: Run) -> None:
    code, out, err = run("--before", "lab", "--after", "lab:base", *words)
    assert code == 2 and said in err and out == "" and err.count("\n") == 1


def test_a_model_is_not_audited_against_itself(run: Run) -> None:
    code, _, err = run("--before", "lab", "--after", "lab", "-s", "lab_harm")
    assert code == 2 and "two targets are named" in err
