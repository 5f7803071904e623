"""The first screen: fast, complete, with examples to paste; and the catalogue."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from resafe.cli import cli

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "scipy", "jinja2", "pydantic", "numpy", "rich")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from resafe.cli import cli; r = CliRunner().invoke(cli, ['--help']); "
        "assert r.exit_code == 0, r.output; print(*sorted(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [m for m in HEAVY if m in loaded] == []


def test_help_fits_one_screen_and_shows_three_examples() -> None:
    text = CliRunner().invoke(cli, ["--help"]).output
    assert text.count("\n") < 40 and text.split("Examples")[1].count("\n    resafe ") == 3


def test_every_mitigation_is_listed_with_its_stage() -> None:
    text = CliRunner().invoke(cli, ["list"]).output
    for name, stage in (("mix_safety", "data"), ("realign_dpo", "repair"), ("filter_output", "guard")):
        assert any(line.startswith(name) and stage in line for line in text.split("\n"))


def test_info_shows_parameters_defaults_needs_and_paper() -> None:
    text = CliRunner().invoke(cli, ["info", "restore_weights"]).output
    for said in ("strength", "default 0.5", "--aligned", "2109.01903", "repair", "LoRA"):
        assert said in text


def test_a_users_own_eval_py_is_not_shadowed(tmp_path: Path) -> None:
    (tmp_path / "eval.py").write_text("MINE = 1\n")
    (tmp_path / "mitigations.py").write_text("MINE = 2\n")
    code = "import eval, mitigations, resafe.eval, resafe.mitigations; print(eval.MINE, mitigations.MINE, 'filter_output' in resafe.mitigations.names())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "2", "True"]
