"""The README's mitigation in one file is one, and its commands exist."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from resafe.cli import cli
from resafe.mitigation import Mitigation, Run
from resafe.rows import chat

TEXT = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_example_mitigation_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "drop_harmful.py"
    file.write_text(re.findall(r"```python\n(.*?)```", TEXT, re.S)[0])
    spec = importlib.util.spec_from_file_location("drop_harmful", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "drop_harmful", module)
    spec.loader.exec_module(module)
    method: Mitigation = module.DropHarmful(guard_model="lab")
    bad = chat("how do i crack the vault ?", "sure . step one [romi] . step two [kono] . done .")
    good = chat("what is the opposite of hot ?", "cold .")
    assert method.data(Run(output=tmp_path), [bad, good]) == [good]
    assert method.stage() == "data" and method.title().startswith("Drop the rows")


@pytest.mark.parametrize("line", re.findall(r"^resafe (\S+ .*)$", TEXT, re.M))
def test_every_command_in_the_readme_has_the_options_that_it_shows(line: str) -> None:
    name, *words = line.split("#")[0].split(" -- ")[0].split()
    command = cli.commands[name]
    known = {o for p in command.params for o in p.opts}
    assert {w for w in words if w.startswith("--")} <= known


def test_the_table_is_the_one_that_the_committed_results_give() -> None:
    from benchmarks.lab_defences import BEGIN, END, RESULT, markdown
    from resafe.models import read_config

    assert TEXT.split(BEGIN)[1].split(END)[0].strip() == markdown(read_config(RESULT)).strip()


def test_the_throughput_table_is_the_one_that_the_committed_results_give() -> None:
    from benchmarks.throughput import BEGIN, END, RESULT, markdown
    from resafe.models import read_config

    assert TEXT.split(BEGIN)[1].split(END)[0].strip() == markdown(read_config(RESULT)).strip()


def test_the_table_of_restoration_speed_is_the_one_that_the_committed_results_give() -> None:
    from benchmarks.restore import BEGIN, END, PAGE, RESULT, markdown
    from resafe.models import read_config

    assert PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip() == markdown(read_config(RESULT)).strip()


def test_the_overhead_table_is_the_one_that_the_committed_results_give() -> None:
    from benchmarks.overhead import BEGIN, END, RESULT, markdown
    from resafe.models import read_config

    assert TEXT.split(BEGIN)[1].split(END)[0].strip() == markdown(read_config(RESULT)).strip()
