"""What is installed: one importable name, everything that the commands need, and a light command line."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the sources, so that no build folder appears among them."""
    home = tmp_path_factory.mktemp("build")
    for name in ("resafe", "mitigations", "eval", "recipes"):
        shutil.copytree(ROOT / name, home / "src" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, home / "src" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(home), str(home / "src")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(home.glob("*.whl")))


def test_nothing_but_resafe_becomes_importable(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"resafe"}


@pytest.mark.parametrize(
    "file",
    [
        "resafe/mitigations/mix_safety.py", "resafe/eval/suites/advbench.yaml", "resafe/eval/templates/report.html.jinja",
        "resafe/recipes/lab/demo.yaml", "resafe/lab/words.yaml", "resafe/lab/checkpoints/aligned/model.safetensors",
        "resafe/lab/checkpoints/guard.safetensors", "resafe/data/safety_pack/pack.jsonl", "resafe/data/guard/offline.safetensors",
        "resafe/data/guard/encoder.safetensors",
        "resafe/data/suites/xstest/xstest_prompts.csv", "resafe/data/suites/xstest/LICENSE", "resafe/py.typed",
    ],
)  # fmt: skip
def test_the_wheel_carries_what_the_commands_need(file: str, wheel: zipfile.ZipFile) -> None:
    assert file in wheel.namelist()


def test_every_tracked_data_file_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT / "resafe" / "data").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert here <= set(wheel.namelist())
