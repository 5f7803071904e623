"""resafe repair --search from end to end on the lab model: what is printed, what is written, what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from resafe.cli import main
from resafe.lab.suites import heldout_rows
from tests.conftest import write_rows

Run = Callable[..., tuple[int, str, str]]
DEV = ["--search-suite", "lab_harm_dev", "--search-suite", "lab_borderline_dev", "--search-limit", "24", "--store", "none"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], attacked: Callable[..., Path], tmp_path: Path) -> Run:
    """Run `resafe repair` on the attacked lab model in this process: (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        tuned = attacked("explicit_10", lr=3e-4)
        monkeypatch.setattr(sys, "argv", ["resafe", "repair", *map(str, (tuned, "--aligned", "lab", "-o", tmp_path / "fixed", *words))])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture
def held(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", heldout_rows("heldout_skills", 200))


def test_the_curve_is_printed_drawn_and_kept_and_the_repair_is_made(run: Run, held: Path, tmp_path: Path) -> None:
    code, out, _ = run("-m", "restore_weights", "--search", *DEV, "--doses", "0.3,0.95", "--margin", "5", "--heldout", held)
    assert code == 0 and out.rstrip().endswith(str(tmp_path / "fixed"))
    assert "before fine-tuning" in out and "chosen" in out and "restore_weights with strength 0.95: harmful answers" in out
    beside = tmp_path / "fixed-search"
    page = (beside / "search.html").read_text()
    assert "Dose-response" in page and "step one" not in page and "[romi]" not in page, "no response in a report"
    told = json.loads((beside / "search.json").read_text())
    assert told["dose"] == 0.95 and told == json.loads((tmp_path / "fixed" / "resafe.json").read_text())["search"]


def test_a_margin_that_no_row_can_show_is_refused_with_the_curve_beside(run: Run, held: Path, tmp_path: Path) -> None:
    code, out, err = run("-m", "restore_weights", "--search", *DEV, "--doses", "0.5", "--margin", "0.1", "--heldout", held)
    assert code == 2 and "before fine-tuning" in out and "rows in --heldout; or allow a larger --margin" in err.split("\n")[-2]
    assert (tmp_path / "fixed-search" / "search.html").is_file() and not (tmp_path / "fixed").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "restore_weights", "--margin", "3"], "--margin belongs to --search"),
        (["-m", "restore_weights", "--doses", "0.1"], "--doses belongs to --search"),
        (["-m", "restore_weights", "--search", "--doses", "a,b"], "--doses takes numbers with commas between them, such as 0.1,0.2; found 'a,b'"),
        (["-m", "restore_weights", "--search", "--doses", "0.1,inf"], "--doses takes numbers"),
        (["-m", "restore_weights", "--search"], "name them with --heldout"),
        (["-m", "filter_output", "--search"], "name one that has, such as restore_weights"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(words: list[str], said: str, run: Run, tmp_path: Path) -> None:
    code, out, err = run(*words)
    assert code == 2 and said in err and out == "" and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
