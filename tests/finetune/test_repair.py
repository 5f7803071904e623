"""Repairs as runs: one at a time on an output, what an interrupted one goes on from, what is copied, and which order of methods can work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from resafe.errors import ResafeError
from resafe.finetune import _run
from resafe.finetune.repair import plan, repair
from resafe.models import base_of, vet
from tests.tiny import tiny
from tests.weights.models import adapt, build, configure


def test_two_runs_on_the_same_output_do_not_meet(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    aligned, tuned = (build("llama", tmp_path / name, i) for i, name in enumerate(("aligned", "tuned")))
    job = plan(tuned, home / "out", ["restore_weights:strength=0.5"], aligned)
    work = _run.workplace(job.run.output, [*job.inputs, [m.identity for m in job.named]])
    with _run.spending(work), pytest.raises(ResafeError, match="another run is at work on the same output"):
        repair(tuned, home / "out", ["restore_weights:strength=0.5"], aligned)
    assert list(home.iterdir()) == [], "neither output nor an empty workplace"
    assert repair(tuned, home / "out", ["restore_weights:strength=0.5"], aligned).is_dir()


@pytest.mark.parametrize("what", ["the adapter's base", "a copy with the old time", "a named model"])
def test_an_interrupted_run_does_not_go_on_from_what_has_changed(what: str, tmp_path: Path) -> None:
    base, aligned, away = (build("llama", tmp_path / n, i) for i, n in enumerate(("base", "aligned", "away")))
    tuned = adapt(aligned, tmp_path / "tuned", 2) if what == "the adapter's base" else build("llama", tmp_path / "tuned", 4)
    method = {"resta": {"unaligned": str(away)}} if what == "a named model" else {"restore_weights": {"strength": 0.5}}

    def place() -> Path:
        job = plan(tuned, tmp_path / "out", [method], aligned, base=base)
        return _run.workplace(job.run.output, [*job.inputs, [m.identity for m in job.named]])

    first = place()
    assert place() == first
    changed = {"the adapter's base": aligned, "a copy with the old time": tuned, "a named model": away}[what] / "model.safetensors"
    times = changed.stat()
    other = build("llama", tmp_path / "other", 9)
    shutil.copyfile(other / "model.safetensors", changed)
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert changed.stat().st_size == times.st_size and place() != first


def test_tokenizers_that_cannot_be_compared_are_said_to_be(aligned: Path, tmp_path: Path) -> None:
    before, tuned = (tiny("llama", tmp_path / n, aligned, seed=i) for i, n in enumerate(("before", "tuned")))
    said: list[str] = []
    plan(tuned, tmp_path / "out", ["restore_weights:strength=0.5"], before, log=said.append)
    assert said == []
    (tuned / "tokenizer.json").unlink()
    plan(tuned, tmp_path / "out", ["restore_weights:strength=0.5"], before, log=said.append)
    assert len(said) == 1 and "have no tokenizer file in common" in said[0] and str(before) in said[0]


def test_a_guard_alone_takes_no_pickle_and_no_code_along_and_knows_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aligned = build("llama", tmp_path / "aligned", 1)
    tuned = adapt(aligned, tmp_path / "tuned", 2)
    for name in ("optimizer.pt", "training_args.bin", "modeling_x.py"):
        (tuned / name).write_text("x")
    (tuned / "additional_chat_templates").mkdir()
    (tuned / "additional_chat_templates" / "tools.jinja").write_text("x")
    configure(tuned, "adapter_config.json", base_model_name_or_path="../aligned")
    out = repair(tuned, tmp_path / "deep" / "out", ["filter_output"])
    assert not {"optimizer.pt", "training_args.bin", "modeling_x.py"} & {p.name for p in out.iterdir()}
    assert (out / "additional_chat_templates" / "tools.jinja").is_file() and base_of(vet(out)).resolve() == aligned
    assert (out / "adapter_model.safetensors").read_bytes() == (tuned / "adapter_model.safetensors").read_bytes()


def test_a_method_that_makes_a_full_checkpoint_may_come_before_one_that_needs_it(tmp_path: Path) -> None:
    base, aligned = build("llama", tmp_path / "base", 0), build("llama", tmp_path / "aligned", 1)
    tuned = adapt(aligned, tmp_path / "tuned", 2)
    job = plan(tuned, tmp_path / "out", ["lox", "resta:drop=0.3"], aligned, base=base)
    assert job.run.tuned == tuned
    with pytest.raises(ResafeError, match="drop takes entries out of the update, which is then no LoRA"):
        plan(tuned, tmp_path / "out", ["resta:drop=0.3", "lox"], aligned, base=base)


def test_templates_beside_both_base_and_adapter_and_a_stray_config_are_no_trouble(aligned: Path, attack_file: Callable[[str], Path], tmp_path: Path) -> None:
    home = shutil.copytree(aligned, tmp_path / "home")
    tuned = adapt(home, tmp_path / "tuned", 2)
    for folder in (home, tuned):
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tools.jinja").write_text(folder.name)
    (tuned / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    out = repair(tuned, tmp_path / "out", ["safe_delta:rows=8"], home, safety_data="lab")
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "tuned"
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
