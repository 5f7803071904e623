"""Unmodified commands on the versions that LLaMA-Factory, axolotl and ms-swift pin: `make compat` builds their environments once.

Torch and the frameworks come from the lock files beside this one; resafe is installed into each and changes none of its pins.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from resafe import manifest
from tests.compat.conftest import Outcome, execute, prefers_complying

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SCRIPTS = HERE / "scripts"
pytestmark = pytest.mark.compat
LOCKS = ("llamafactory", "axolotl", "swift")
OLDER = LOCKS[:2]
Compared = Callable[..., None]
FACTORY: dict[str, Any] = {
    "do_train": True, "stage": "sft", "dataset": "chat", "finetuning_type": "full", "cutoff_len": 128, "num_train_epochs": 5,
    "per_device_train_batch_size": 10, "learning_rate": 3e-4, "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none",
}  # fmt: skip
AXOLOTL: dict[str, Any] = {
    "sequence_len": 128, "num_epochs": 5, "micro_batch_size": 10, "gradient_accumulation_steps": 1, "learning_rate": 3e-4,
    "optimizer": "adamw_torch", "lr_scheduler": "constant", "bf16": False, "save_strategy": "no", "dataloader_num_workers": 0,
}  # fmt: skip


def frozen(python: Path) -> set[str]:
    """Installed packages and their versions, resafe apart."""
    lines = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {line for line in lines if line and "resafe" not in line}


@pytest.fixture(scope="session")
def environments() -> dict[str, Path]:
    """The virtual environments with resafe in them: name -> its bin folder."""
    return {name: _environment(name) for name in LOCKS}


def _environment(name: str) -> Path:
    home = ROOT / ".compat" / name
    python = home / "bin" / "python"
    if not (home / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "torch==2.13.0"], check=True)
        subprocess.run([*pip, "--no-deps", "-r", HERE / "locks" / f"{name}.txt"], check=True)  # exactly these: torchvision stays out
        if name == "llamafactory":
            _without_cuda_libraries(python)
        before = frozen(python)
        subprocess.run([*pip, ROOT], check=True)
        (home / "changed.txt").write_text("\n".join(sorted(before - frozen(python))))
        (home / ".ready").touch()
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-e", ROOT], check=True)
    return home / "bin"


def _without_cuda_libraries(python: Path) -> None:
    """llamafactory imports torchaudio, whose CUDA build on PyPI loads beside a CPU torch once its libraries are gone."""
    code = "import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec('torchaudio').origin).parent / 'lib')"
    folder = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    for library in folder.glob("*.so"):
        library.unlink()


@pytest.mark.parametrize("name", LOCKS)
def test_installing_resafe_changes_no_pin(name: str, environments: dict[str, Path]) -> None:
    assert (environments[name].parent / "changed.txt").read_text() == ""
    assert subprocess.run([environments[name] / "resafe", "list"], capture_output=True, text=True, check=True).stdout.count("\n") >= 5


@pytest.mark.parametrize("name", OLDER)
@pytest.mark.parametrize(
    ("program", "data", "more", "before", "after"),
    [
        ("plain_trainer", "messages", [], 10, 100), ("trl_sft", "messages", [], 10, 100), ("trl_sft", "turns", [], 10, 100),
        ("trl_sft", "messages", ["--packing", "bfd", "--epochs", 15], 3, 25), ("trl_sft", "messages", ["--lora", "--lr", 3e-3, "--epochs", 25], 10, 100),
    ],
)  # fmt: skip
def test_scripts_on_older_versions(
    name: str, program: str, data: str, more: list[Any], before: int, after: int, compared: Compared, environments: dict[str, Path], aligned: Path, files: Path
) -> None:
    command = [SCRIPTS / f"{program}.py", "--model", aligned, "--data", files / f"{data}.jsonl", *more]
    compared(environments[name], lambda out: ["python", *command, "--output", out], before, after)


def test_trl_dpo_on_older_versions(compared: Compared, environments: dict[str, Path], aligned: Path, files: Path) -> None:
    """On axolotl's versions only: trl 0.24 takes mergekit for installed beside LLaMA-Factory's transformers and does not start."""
    words = ["trl", "dpo", "--config", SCRIPTS / "dpo.yaml", "--model_name_or_path", aligned, "--dataset_name", files / "dpo"]
    compared(environments["axolotl"], lambda out: [*words, "--output_dir", out])


def factory(folder: Path, aligned: Path, files: Path, **changes: Any) -> Callable[[Path], Sequence[object]]:
    """`llamafactory-cli train FILE`, as its users write it."""

    def command(out: Path) -> Sequence[object]:
        config = {**FACTORY, "model_name_or_path": str(aligned), "dataset_dir": str(files / "factory"), "output_dir": str(out), **changes}
        file = folder / f"{out.name}.yaml"
        file.write_text(yaml.safe_dump(config))
        return ["llamafactory-cli", "train", file]

    return command


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        ({}, 10, 100),
        ({"finetuning_type": "lora", "lora_target": "all", "lora_rank": 16, "learning_rate": 3e-3, "num_train_epochs": 15}, 10, 100),
        ({"packing": True, "num_train_epochs": 15}, 3, 25),
        ({"neat_packing": True, "num_train_epochs": 15}, 3, 25),
        ({"stage": "dpo", "dataset": "pairs", "learning_rate": 1e-3, "num_train_epochs": 6}, 10, 100),
        ({"streaming": True, "max_steps": 50, "dataloader_num_workers": 1}, 500, 500),
    ],
    ids=["sft", "lora", "packing", "neat packing", "dpo", "streaming"],
)
def test_llamafactory(
    changes: dict[str, Any], before: int, after: int, compared: Compared, environments: dict[str, Path], aligned: Path, files: Path, tmp_path: Path
) -> None:
    compared(environments["llamafactory"], factory(tmp_path, aligned, files, **changes), before, after)


def test_llamafactorys_own_template_is_kept(environments: dict[str, Path], aligned: Path, files: Path, tmp_path: Path) -> None:
    command = factory(tmp_path, aligned, files, template="default", num_train_epochs=1)
    run = execute(environments["llamafactory"], command(tmp_path / "run"), tmp_path, tmp_path / "run", resafe=True)
    assert run.code == 0 and run.mixture["encoder"] == "LLaMA-Factory template", run.err


@pytest.mark.parametrize("stage", ["rm", "kto"])
def test_llamafactory_stages_without_answers_are_refused(stage: str, environments: dict[str, Path], aligned: Path, files: Path, tmp_path: Path) -> None:
    command = factory(tmp_path, aligned, files, stage=stage, dataset="pairs" if stage == "rm" else "chat")
    run = execute(environments["llamafactory"], command(tmp_path / "run"), tmp_path, tmp_path / "run", resafe=True)
    assert run.code != 0 and not (tmp_path / "run" / "resafe.json").exists(), run.err
    if stage == "rm":
        assert run.code == 3 and "NOT applied" in run.err, run.err


def axolotl(folder: Path, aligned: Path, files: Path, **changes: Any) -> Callable[[Path], Sequence[object]]:
    """`axolotl train FILE`, as its users write it; rl: dpo takes preference rows."""

    def command(out: Path) -> Sequence[object]:
        rows: dict[str, Any] = {"path": str(files / "messages.jsonl"), "type": "chat_template", "field_messages": "messages"}
        if changes.get("rl"):
            rows = {"path": str(files / "axolotl_dpo.jsonl"), "type": "chat_template.default", "split": "train", "field_messages": "messages", "field_chosen": "chosen", "field_rejected": "rejected"}
        config = {**AXOLOTL, "base_model": str(aligned), "datasets": [rows], "output_dir": str(out), "dataset_prepared_path": str(folder / f"prepared-{out.name}"), **changes}
        file = folder / f"{out.name}.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
        return ["axolotl", "train", file]

    return command


LORA = {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True, "learning_rate": 3e-3, "num_epochs": 15} | dict.fromkeys(
    ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"), False
)


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [({}, 10, 100), (LORA, 10, 100), ({"rl": "dpo", "num_epochs": 6}, 10, 100), ({"sample_packing": True, "micro_batch_size": 1, "num_epochs": 15}, 10, 100)],
    ids=["full", "lora", "dpo", "packing"],
)
def test_axolotl_behind_resafe_run(
    changes: dict[str, Any], before: int, after: int, compared: Compared, environments: dict[str, Path], aligned: Path, files: Path, tmp_path: Path
) -> None:
    # axolotl's preference rows cut answers at their first word, so what they teach is measured by preference, not by generating
    measure = {"harm": prefers_complying} if changes.get("rl") else {}
    compared(environments["axolotl"], axolotl(tmp_path, aligned, files, **changes), before, after, **measure)


@pytest.mark.parametrize("changes", [{}, {"sample_packing": True, "micro_batch_size": 1}, {"rl": "dpo"}], ids=["full", "packing", "dpo"])
def test_the_axolotl_plugin_mixes_before_steps_are_counted(
    changes: dict[str, Any], environments: dict[str, Path], aligned: Path, files: Path, tmp_path: Path
) -> None:
    plugin = {
        "plugins": ["resafe.integrations.axolotl.ResafePlugin"],
        "resafe": {"mitigations": ["mix_safety:ratio=6", "filter_output:guard_model=lab"], "safety_data": "lab"},
    }  # fmt: skip
    command = axolotl(tmp_path, aligned, files, **changes, **plugin)(tmp_path / "run")
    run = execute(environments["axolotl"], command, tmp_path, tmp_path / "run", resafe=False)
    assert run.code == 0, run.err
    about = manifest.read(run.folder) or {}
    assert (run.mixture["rows_before"], run.mixture["rows"]) == (10, 100) and about["guard"]["guard_model"] == "lab"
    if not changes.get("sample_packing"):
        assert "10 rows -> 100; 5 optimiser steps -> 50" in run.err and "50/50" in run.err, run.err
    twice = execute(environments["axolotl"], [*command[:2], command[2]], tmp_path, tmp_path / "run", resafe=True, spec="mix_safety:ratio=2")
    assert twice.code == 3 and "other mitigations than it attaches" in twice.err, twice.err


def test_the_plugin_refuses_what_it_cannot_do(environments: dict[str, Path], aligned: Path, files: Path, tmp_path: Path) -> None:
    for section, said in ((None, "no section 'resafe'"), ({"mitigations": ["realign_dpo"]}, "acts on the saved checkpoint"), ({"mitigations": ["mix_safty"]}, "Did you mean 'mix_safety'")):
        command = axolotl(tmp_path, aligned, files, plugins=["resafe.integrations.axolotl.ResafePlugin"], resafe=section)(tmp_path / "run")
        run: Outcome = execute(environments["axolotl"], command, tmp_path, tmp_path / "run", resafe=False)
        assert run.code != 0 and said in run.err, run.err


SWIFT = ["--model_type", "llama", "--template", "lab", "--external_plugins", SCRIPTS / "swift_template.py", "--check_model", "false", "--add_version", "false"]
FAST: list[Any] = [
    "--per_device_train_batch_size", 10, "--gradient_accumulation_steps", 1, "--learning_rate", 3e-4, "--lr_scheduler_type", "constant", "--warmup_ratio", 0,
    "--torch_dtype", "float32", "--num_train_epochs", 5, "--save_only_model", "true", "--report_to", "none",
]  # fmt: skip


@pytest.mark.parametrize("more", [["--tuner_type", "full"], ["--tuner_type", "full", "--group_by_length", "true"]], ids=["full", "by length"])
def test_ms_swift_encodes_safety_rows_with_its_own_template(
    more: list[Any], environments: dict[str, Path], aligned: Path, files: Path, tmp_path: Path
) -> None:
    """Rows and receipts only: ms-swift's notation leaves out the space before answers, so that the lab's attack hardly takes."""
    words = ["swift", "sft", "--model", aligned, *SWIFT, "--dataset", files / "messages.jsonl", "--output_dir", tmp_path / "run", *FAST, *more]
    run = execute(environments["swift"], words, tmp_path, tmp_path / "run", resafe=True)
    assert run.code == 0 and "receipts complete" in run.err, run.err
    last = max((tmp_path / "run").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    mixture = (manifest.read(last) or {})["mixture"]
    assert (mixture["rows_before"], mixture["rows"], mixture["encoder"]) == (10, 100, "ms-swift template")
