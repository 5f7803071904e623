"""`resafe run` from outside: what cannot be proved applied is exit code 3, and the command itself is left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resafe import manifest
from resafe.lab.attacks import attack_rows
from tests.conftest import write_rows

SCRIPT = Path(__file__).resolve().parent.parent / "compat" / "scripts" / "plain_trainer.py"
RUN = [sys.executable, "-c", "from resafe.cli import main; main()", "run", "--mitigation", "mix_safety:ratio=1", "--safety-data", "lab"]
Done = subprocess.CompletedProcess[str]
ENV = {k: v for k, v in os.environ.items() if not k.startswith("RESAFE_")}


def call(*words: object, cwd: Path, run: list[str] = RUN, **env: str) -> Done:
    return subprocess.run([*run, "--", *map(str, words)], cwd=cwd, env={**ENV, **env}, capture_output=True, text=True, timeout=300)


@pytest.fixture
def train(aligned: Path, tmp_path: Path) -> Callable[..., list[Any]]:
    """The command of somebody's script; words are added to it."""
    data = write_rows(tmp_path / "d.jsonl", [{"messages": r["messages"]} for r in attack_rows("explicit_10")])

    def words(*more: object, output: str = "out", epochs: float = 1) -> list[Any]:
        return [sys.executable, SCRIPT, "--model", aligned, "--data", data, "--output", tmp_path / output, "--epochs", epochs, *more]

    return words


def script(folder: Path, text: str) -> list[Any]:
    file = folder / "script.py"
    file.write_text(text)
    return [sys.executable, file]


def test_the_manifest_says_what_was_trained_on(train: Callable[..., list[Any]], tmp_path: Path) -> None:
    done = call(*train("--save-steps", 2), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "10 rows -> 25 (15 safety rows, x2.50); 1 optimiser steps -> 3" in done.stderr
    about = manifest.read(tmp_path / "out") or {}
    assert about["verb"] == "run" and about["receipts"] == {"verified": True, "world": 1, "trainings": 1}
    assert about["mixture"]["rows"] == 25 and about["mixture"]["added"] == 15 and about["safety"]["source"] == "lab"
    assert (manifest.read(tmp_path / "out" / "checkpoint-2") or {})["mixture"] == about["mixture"], "checkpoints say it too"


@pytest.mark.parametrize("flag", ["-E", "-I", "-S"])
def test_a_python_that_does_not_load_the_hook_is_noticed(flag: str, tmp_path: Path) -> None:
    done = call(sys.executable, flag, "-c", "print('trained')", cwd=tmp_path)
    assert done.returncode == 3 and done.stdout == "trained\n"
    assert "NOT applied" in done.stderr and f"python {flag} ignores PYTHONPATH" in done.stderr
    assert "resafe mix DATA.jsonl -o MIXED.jsonl --mitigation mix_safety:ratio=1 --safety-data lab" in done.stderr


def test_a_training_with_python_dash_e_is_noticed(train: Callable[..., list[Any]], tmp_path: Path) -> None:
    python, *rest = train()
    done = call(python, "-E", *rest, cwd=tmp_path)
    assert done.returncode == 3 and (tmp_path / "out" / "model.safetensors").is_file() and not (tmp_path / "out" / "resafe.json").exists()


def test_a_pythonpath_set_anew_is_noticed_and_helped_by_the_installed_hook(train: Callable[..., list[Any]], tmp_path: Path) -> None:
    from resafe.finetune import hook

    words = ["env", "PYTHONPATH=/nowhere", *train()]
    assert not hook.place().exists()
    done = call(*words, cwd=tmp_path)
    assert done.returncode == 3 and "resafe hook install" in done.stderr
    shutil.rmtree(tmp_path / "out")
    try:
        hook.install()
        for prefix in (words[:2], []):  # also with the hook there twice
            done = call(*prefix, *train(), cwd=tmp_path)
            assert done.returncode == 0 and "10 rows -> 25" in done.stderr, done.stderr
            shutil.rmtree(tmp_path / "out")
        isolated = [words[2], "-I", *words[3:]]
        assert call(*isolated, cwd=tmp_path).returncode == 0
        bare = subprocess.run([sys.executable, "-c", "import sys; print('_resafe_start' in sys.modules)"], capture_output=True, text=True, env=ENV)
        assert bare.stdout == "False\n", "elsewhere it does nothing"
    finally:
        hook.uninstall()
    assert not hook.place().exists() and hook.uninstall() is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("print('hello')", "never imported"),
        ("import transformers.trainer", "no Trainer.train() was called"),
        ("import subprocess, sys; subprocess.run([sys.executable, '-c', 'import transformers.trainer; raise SystemExit(1)'])", "no Trainer.train()"),
    ],
)
def test_a_script_that_never_trains_is_noticed(text: str, said: str, tmp_path: Path) -> None:
    done = call(*script(tmp_path, text), cwd=tmp_path)
    assert done.returncode == 3 and said in done.stderr


def test_a_crash_before_training_keeps_its_exit_code(tmp_path: Path) -> None:
    done = call(*script(tmp_path, "raise SystemExit(7)"), cwd=tmp_path)
    assert done.returncode == 7 and "had not been applied" in done.stderr


def test_no_rows_and_no_steps_are_noticed(train: Callable[..., list[Any]], tmp_path: Path) -> None:
    done = call(*train(epochs=0), cwd=tmp_path)
    assert done.returncode == 3 and "0 steps" in done.stderr
    nothing = train(output="other")
    (tmp_path / "d.jsonl").write_text("")
    done = call(*nothing, cwd=tmp_path)
    assert done.returncode != 0 and not (tmp_path / "other" / "model.safetensors").exists()


def test_a_trainer_without_rows_is_refused_before_training(aligned: Path, tmp_path: Path) -> None:
    text = f"""
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
empty = Dataset.from_dict({{"input_ids": [], "labels": []}})
trainer = Trainer(AutoModelForCausalLM.from_pretrained({str(aligned)!r}), TrainingArguments("out", use_cpu=True, report_to="none"), train_dataset=empty)
try:
    trainer.train()
except Exception:
    pass  # a script that swallows what goes wrong
"""
    done = call(*script(tmp_path, text), cwd=tmp_path)
    assert done.returncode == 3 and "no training rows" in done.stderr


WORKERS = """
import os, subprocess, sys
if "RANK" not in os.environ:
    workers = [
        subprocess.Popen([sys.executable, __file__, *sys.argv[1:]],
                         env={**os.environ, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]})
        for r in range(2)
    ]
    for w in workers:
        w.wait()
    raise SystemExit(0)  # a launcher that does not care what became of its workers
if os.environ["RANK"] == "1":
    import transformers
    class Dies(transformers.TrainerCallback):
        def on_step_begin(self, *a, **k):
            os._exit(9)
    import transformers.trainer
    transformers.trainer.DEFAULT_CALLBACKS.append(Dies)
import runpy
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_worker_that_dies_is_noticed_even_if_its_launcher_does_not_care(train: Callable[..., list[Any]], tmp_path: Path) -> None:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    done = call(*script(tmp_path, WORKERS), port, *train("--batch", 2)[1:], cwd=tmp_path)
    assert done.returncode == 3 and "never finished training" in done.stderr, done.stderr


def test_an_environment_without_resafe_is_told(train: Callable[..., list[Any]], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os, sys\nif 'RESAFE_RECEIPTS' in os.environ:\n    sys.modules['resafe'] = None\n")
    done = call(*train(), cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 3 and "install resafe in the environment of the training command" in done.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists(), "nothing was trained"


def test_the_users_own_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("MINE = 42\n")
    done = call(sys.executable, "-c", "import sitecustomize; print(sitecustomize.MINE)", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.stdout == "42\n"


def test_the_source_of_the_trainer_stays_readable(tmp_path: Path) -> None:
    text = "import inspect\nfrom transformers import Trainer\nprint(inspect.getsource(Trainer.train).split('(')[0].strip(), Trainer.train.__name__)"
    done = call(*script(tmp_path, text), cwd=tmp_path)
    assert done.stdout == "def train train\n", done.stderr


def test_the_hook_itself_changes_no_bit_of_the_result(train: Callable[..., list[Any]], tmp_path: Path) -> None:
    """The same command bare, and under a mitigation that acts at serving only: equal weights; the guard is recorded."""
    bare = subprocess.run([str(w) for w in train()], env=ENV, cwd=tmp_path, capture_output=True, text=True)
    assert bare.returncode == 0 and not (tmp_path / "out" / "resafe.json").exists()
    guarded = [*RUN[:4], "--mitigation", "filter_output:guard_model=lab"]
    done = call(*train(output="watched"), cwd=tmp_path, run=guarded)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "watched" / "model.safetensors").read_bytes()
    assert (manifest.read(tmp_path / "watched") or {})["guard"]["guard_model"] == "lab"


def test_exit_codes_and_signals_pass_through(tmp_path: Path) -> None:
    assert call("sh", "-c", "exit 5", cwd=tmp_path).returncode == 5
    for name in ("KILL", "TERM", "SEGV"):
        assert call("sh", "-c", f"kill -{name} $$", cwd=tmp_path).returncode == -getattr(signal, f"SIG{name}")
    done = call("no-such-command", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def started(words: list[Any], ready: Callable[[], bool], **options: Any) -> subprocess.Popen[str]:
    def heard() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and pass that on

    process = subprocess.Popen(
        [*RUN, "--", *map(str, words)], env=ENV, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=heard, **options
    )  # fmt: skip
    for _ in range(600):
        if ready():
            return process
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("the command never came that far")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_sent_to_the_wrapper_reaches_the_command_once(name: str, tmp_path: Path) -> None:
    text = f"""
import pathlib, signal, sys, time
heard = []
signal.signal(signal.{name}, lambda *_: heard.append(1))
pathlib.Path("ready").touch()
for _ in range(100):
    time.sleep(0.1)
    if heard:
        time.sleep(0.5)
        sys.exit(40 + len(heard))
"""
    process = started(script(tmp_path, text), (tmp_path / "ready").exists, cwd=tmp_path)
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=60)
    assert process.returncode == 41


def test_ctrl_c_leaves_the_users_checkpoints_alone(train: Callable[..., list[Any]], tmp_path: Path) -> None:
    words = train("--save-steps", 1, epochs=400)
    process = started(words, lambda: (tmp_path / "out" / "checkpoint-3" / "trainer_state.json").exists(), cwd=tmp_path, start_new_session=True)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    _, err = process.communicate(timeout=120)
    assert process.returncode not in (0, 3), err
    assert "Traceback" not in err.split("KeyboardInterrupt")[-1] and (tmp_path / "out" / "checkpoint-3" / "model.safetensors").is_file()
    assert not list(tmp_path.glob("*-repaired"))


def test_two_nested_runs_apply_once(train: Callable[..., list[Any]], tmp_path: Path) -> None:
    done = call(*RUN, "--", *train(), cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.count("10 rows -> 25 (") == 1, done.stderr
    assert (manifest.read(tmp_path / "out") or {})["mixture"]["rows"] == 25
    other = [*RUN[:4], "--mitigation", "mix_safety:ratio=2", "--safety-data", "lab"]
    done = call(*other, "--", *train(output="two"), cwd=tmp_path)
    assert done.returncode == 2 and "already runs below a resafe run with mix_safety" in done.stderr
    pack = [*RUN[:6], "--safety-data", "default"]
    done = call(*pack, "--", *train(output="three"), cwd=tmp_path)
    assert done.returncode == 2 and "already runs below" in done.stderr, "other safety rows are another run"


def test_resuming_with_another_mixture_is_refused(train: Callable[..., list[Any]], tmp_path: Path) -> None:
    assert call(*train("--save-steps", 2), cwd=tmp_path).returncode == 0
    same = call(*train("--save-steps", 2, "--resume", epochs=2), cwd=tmp_path)
    assert same.returncode == 0, same.stderr
    other = call(*train("--save-steps", 2, "--resume", epochs=3), cwd=tmp_path, run=[*RUN, "--seed", "5"])
    assert other.returncode == 3 and "was trained on the mixture" in other.stderr and "NOT applied" in other.stderr
    shutil.rmtree(tmp_path / "out")
    subprocess.run([str(w) for w in train("--save-steps", 1)], env=ENV, cwd=tmp_path, check=True, capture_output=True)
    bare = call(*train("--save-steps", 1, "--resume", epochs=2), cwd=tmp_path)
    assert bare.returncode == 3 and "no mixture of resafe's" in bare.stderr


def test_a_repair_runs_afterwards_on_the_saved_folder(train: Callable[..., list[Any]], aligned: Path, tmp_path: Path) -> None:
    """restore_weights finds the model before fine-tuning by itself; at strength 1 it is that model again."""
    from resafe.models import load

    run = [*RUN, "--mitigation", "restore_weights:strength=1", "--mitigation", "filter_output:guard_model=lab"]
    done = call(*train(), cwd=tmp_path, run=run)
    assert done.returncode == 0, done.stderr
    about = manifest.read(tmp_path / "out-repaired") or {}
    assert [m["name"] for m in about["mitigations"]] == ["restore_weights", "filter_output"] and about["guard"]["guard_model"] == "lab"
    assert about["before"]["mixture"]["rows"] == 25
    pairs = zip(load(aligned).model.parameters(), load(tmp_path / "out-repaired").model.parameters())
    assert all((a.float() - b.float()).abs().max() < 1e-6 for a, b in pairs)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_repair_that_needs_the_base_gets_it(train: Callable[..., list[Any]], tmp_path: Path) -> None:
    from resafe import lab

    run = [*RUN[:4], "--mitigation", "safe_lora:rank=8", "--base", str(lab.resolve("lab:base"))]
    done = call(*train(), cwd=tmp_path, run=run)
    assert done.returncode == 0 and (tmp_path / "out-repaired" / "safe_lora.json").is_file(), done.stderr


def test_a_repair_that_fails_is_exit_code_3_and_leaves_the_fine_tune(train: Callable[..., list[Any]], tmp_path: Path) -> None:
    run = [*RUN[:4], "--mitigation", "realign_dpo:pairs=" + str(tmp_path / "pairs.jsonl"), "--safety-data", "lab"]
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n")
    words = [*train(), "--max-steps", 2]
    sabotage = script(tmp_path, f"import subprocess, pathlib; subprocess.run({[str(w) for w in words]!r}, check=True); pathlib.Path('pairs.jsonl').write_text('no json')")
    done = call(*sabotage, cwd=tmp_path, run=run)
    assert done.returncode == 3 and "realign_dpo NOT applied" in done.stderr and "the fine-tuned model is untouched" in done.stderr, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file() and not (tmp_path / "out-repaired").exists()


def test_shards_are_detected_and_a_repair_waits_for_their_merge(train: Callable[..., list[Any]], tmp_path: Path) -> None:
    """A save that holds FSDP shards only, as SHARDED_STATE_DICT leaves it."""
    words = [str(w) for w in train()]
    text = f"""
import pathlib, subprocess
subprocess.run({words!r}, check=True)
shards = pathlib.Path("out/pytorch_model_fsdp_0")
shards.mkdir()
pathlib.Path("out/model.safetensors").rename(shards / "__0_0.distcp")
"""
    merge = f"accelerate merge-weights {tmp_path}/out/pytorch_model_fsdp_0 {tmp_path}/out"
    done = call(*script(tmp_path, text), cwd=tmp_path)
    assert done.returncode == 0 and merge in done.stderr, done.stderr
    shutil.rmtree(tmp_path / "out")
    done = call(*script(tmp_path, text), cwd=tmp_path, run=[*RUN, "--mitigation", "restore_weights:strength=0.5"])
    assert done.returncode == 3 and merge in done.stderr and "restore_weights NOT applied" in done.stderr
    assert f"resafe repair {tmp_path}/out --mitigation restore_weights:strength=0.5 -o {tmp_path}/out-repaired" in done.stderr


def test_bad_flags_are_one_line_before_anything_runs(train: Callable[..., list[Any]], tmp_path: Path) -> None:
    for words, said in (
        (["--mitigation", "mix_safty"], "Did you mean 'mix_safety'"),
        (["--mitigation", "filter_output", "--mix-mode", "replace"], "--mix-mode is for mix_safety"),
        (["--mitigation", "mix_safety", "--safety-data", "no.jsonl"], "no such safety data file"),
        (["--mitigation", "mix_safety", "-o", "x"], "--output is for the repaired model"),
        (["--mitigaton", "mix_safety"], "--mitigation"),
        ([], "at least one mitigation"),
    ):
        done = call(*train(), cwd=tmp_path, run=[*RUN[:4], *words])
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_flags_are_environment_variables_too(train: Callable[..., list[Any]], tmp_path: Path) -> None:
    flags = {"RESAFE_MITIGATION": "mix_safety:ratio=1", "RESAFE_SAFETY_DATA": "lab", "RESAFE_MIX_MODE": "append", "RESAFE_SEED": "0"}
    done = call(*train(), cwd=tmp_path, run=RUN[:4], **flags)
    assert done.returncode == 0 and "10 rows -> 25" in done.stderr


def test_a_job_script_is_watched_by_exports_and_checked_afterwards(train: Callable[..., list[Any]], tmp_path: Path) -> None:
    cli = RUN[:3]
    exports = subprocess.run([*cli, "env", *RUN[4:], "--receipts", str(tmp_path / "receipts")], env=ENV, capture_output=True, text=True, check=True).stdout
    job = tmp_path / "job.sh"
    job.write_text(exports + " ".join(f"'{w}'" for w in train()) + "\n")
    check = [*cli, "receipts", str(tmp_path / "receipts")]
    (tmp_path / "receipts").mkdir()
    assert "RESAFE_RECEIPTS" in exports
    before = subprocess.run(check, env=ENV, capture_output=True, text=True)
    assert before.returncode == 3 and "NOT applied" in before.stderr
    assert subprocess.run(["sh", str(job)], env=ENV, cwd=tmp_path, capture_output=True).returncode == 0
    (made,) = (tmp_path / "receipts").iterdir()  # a folder of this job's own
    after = subprocess.run([*check[:-1], str(made)], env=ENV, capture_output=True, text=True)
    assert after.returncode == 0 and "10 rows -> 25, 1 ranks" in after.stdout and f"saved: {tmp_path / 'out'}" in after.stdout


def test_receipts_are_kept_where_asked_and_hold_no_text(train: Callable[..., list[Any]], tmp_path: Path) -> None:
    done = call(*train(), cwd=tmp_path, run=[*RUN, "--receipts", "kept"], HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    text = "".join(f.read_text() for f in (tmp_path / "kept").iterdir())
    events = [json.loads(line)["event"] for line in text.splitlines()]
    assert events == ["bootstrap", "patched", "applied", "saved", "finished"] or {"applied", "finished", "saved"} <= set(events)
    assert "turnstile" not in text and "hf_secret" not in text and "step one" not in text
    assert call(*train(output="b"), cwd=tmp_path, run=[*RUN, "--receipts", "kept"]).returncode == 2, "never mixed with another run's"


def test_a_plan_trains_nothing_and_says_what_would_be(train: Callable[..., list[Any]], tmp_path: Path) -> None:
    plan = [*RUN[:3], "plan", *RUN[4:]]
    done = call(*train(epochs=3), cwd=tmp_path, run=plan)
    assert done.returncode == 0, done.stderr
    rows = {line.split("  ")[0]: line.split()[-2:] for line in done.stdout.splitlines() if "  " in line}
    assert rows["rows"] == ["10", "25"] and rows["optimiser steps"] == ["3", "9"]
    assert "ms a step on 1 process" in done.stdout and not (tmp_path / "out" / "model.safetensors").exists()


def test_a_plan_of_resafe_train(aligned: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", attack_rows("explicit_10"))
    inner = [*RUN[:3], "train", "--model", aligned, "--data", data, "--mitigation", "mix_safety:ratio=1", "--safety-data", "lab", "-o", tmp_path / "out"]
    done = call(*inner, cwd=tmp_path, run=[*RUN[:3], "plan"])
    assert done.returncode == 0, done.stderr
    assert "25" in done.stdout and sorted(p.name for p in tmp_path.iterdir()) == ["d.jsonl"]
    refused = call(*inner, cwd=tmp_path)
    assert refused.returncode == 2 and "leave resafe run out" in refused.stderr
