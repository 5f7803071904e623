"""Bad input is one clear line and exit code 2; Ctrl-C is 130; nothing half-written stays."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from resafe.cli import main
from resafe.models import load_tokenizer

Run = Callable[..., tuple[int, str]]
GOOD = '{"prompt": "say kite in code .", "completion": "[zuge] ."}\n'


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: (exit code, stderr)."""

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["resafe", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), capsys.readouterr().err

    return call


def data(folder: Path, text: str = GOOD) -> Path:
    file = folder / "d.jsonl"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no rows"),
        (GOOD + "{broken\n", "d.jsonl line 2: not valid JSON"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "line 1: message 1 has role 'robot'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "must alternate user, assistant"),
    ],
)
def test_bad_training_data(text: str, said: str, run: Run, tmp_path: Path) -> None:
    code, err = run("train", "--model", "lab", "--data", data(tmp_path, text), "-o", tmp_path / "out")
    assert code == 2 and said in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mitigation", "mix_safty"], "Did you mean 'mix_safety'"),
        (["--mitigation", "mix_safety:ration=1"], "Did you mean 'ratio'"),
        (["--mitigation", "mix_safety", "--safety-data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--mitigation", "filter_output:guard_model=ofline"], "offline"),
        (["--lr", "-1"], "--lr"),
    ],
)
def test_bad_options_of_train(words: list[str], said: str, run: Run, tmp_path: Path) -> None:
    code, err = run("train", "--model", "lab", "--data", data(tmp_path), "-o", tmp_path / "out", *words)
    assert code == 2 and said in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "d.jsonl"]


def test_missing_files_and_folders(run: Run, tmp_path: Path) -> None:
    code, err = run("train", "--model", "lab", "--data", tmp_path / "no.jsonl", "-o", tmp_path / "out")
    assert (code, "no such data file" in err) == (2, True)
    code, err = run("train", "--model", tmp_path / "no", "--data", data(tmp_path), "-o", tmp_path / "out")
    assert (code, "no such model folder" in err) == (2, True)
    code, err = run("eval", tmp_path / "no")
    assert (code, "no such model folder" in err) == (2, True)
    code, err = run("bench", tmp_path / "no.yaml")
    assert (code, "no such recipe" in err) == (2, True)


def test_an_output_that_exists_is_not_touched(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    code, err = run("train", "--model", "lab", "--data", data(tmp_path), "-o", tmp_path / "out")
    assert code == 2 and "exists already" in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_repair_needs_what_it_needs(run: Run, aligned: Path, tmp_path: Path) -> None:
    code, err = run("repair", aligned, "-m", "restore_weights", "-o", tmp_path / "out")
    assert code == 2 and "--aligned" in err
    code, err = run("repair", aligned, "-m", "mix_safety", "-o", tmp_path / "out")
    assert code == 2 and "acts on training data" in err
    code, err = run("repair", aligned, "-o", tmp_path / "out")
    assert code == 2 and "at least one mitigation" in err


def test_a_different_tokenizer_is_refused(run: Run, aligned: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(aligned, tmp_path / "other"))
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocab = tokens["model"]["vocab"]
    first, second = list(vocab)[600:602]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    code, err = run("repair", other, "--aligned", aligned, "-m", "restore_weights", "-o", tmp_path / "out")
    assert code == 2 and "tokenizer" in err and not (tmp_path / "out").exists()


def test_a_tokenizer_that_does_not_fit_its_model_is_refused(run: Run, aligned: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(aligned, tmp_path / "other"))
    tokenizer = load_tokenizer(other)
    tokenizer.add_tokens(["one", "two too many"])
    tokenizer.save_pretrained(other)
    code, err = run("eval", other, "--suite", "lab_skills", "--limit", 2)
    assert code == 2 and "embedding rows" in err


def test_a_full_disk_is_one_line_and_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("resafe.files.os.fsync", full)
    code, err = run("train", "--model", "lab", "--data", data(tmp_path), "-o", tmp_path / "out", "--epochs", 1)
    assert code == 2 and err.strip().split("\n")[-1].startswith("resafe: No space left on device")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_nothing_and_the_same_command_goes_on(tmp_path: Path) -> None:
    file = data(tmp_path, GOOD * 400)
    command = [
        sys.executable, "-c", "from resafe.cli import main; main()", "train", "--model", "lab", "--data", str(file),
        "-o", str(tmp_path / "out"), "--epochs", "4", "--save-steps", "20",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background shell starts children deaf to it
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, preexec_fn=heard)
    wait_for(lambda: any(tmp_path.glob(".out.work-*/trainer/checkpoint-*/trainer_state.json")), first)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=120)
    assert first.returncode == 130 and "stopped" in err and not (tmp_path / "out").exists()
    second = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert second.returncode == 0, second.stderr
    assert "resuming from" in second.stderr and (tmp_path / "out" / "resafe.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.jsonl", "out"]


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if there():
            return
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.1)
    raise AssertionError("nothing to resume from was ever written")


def test_a_fault_of_resafe_is_no_answer_of_the_gate(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("resafe.eval.evaluate", broken, raising=False)
    code, err = run("audit", "--before", "lab", "--after", "lab:base", "--suite", "lab_harm")
    assert code == 70 and "ZeroDivisionError: a bug" in err and "fault of resafe" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "lab", "--variant", "prefil", "--suite", "lab_harm"], "Did you mean 'prefill'"),
        (["eval", "chat:m@nowhere", "--suite", "lab_harm"], "chat:MODEL@URL"),
        (["eval", "chat:m@http://127.0.0.1:9/v1", "--lm-eval", "arc_easy"], "measures model folders"),
        (["judge", "none.csv", "--judge", "offline", "-o", "x.json"], "no such file: none.csv"),
    ],
)
def test_bad_evaluations(words: list[str], said: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, err = run(*words)
    lines = [line for line in err.splitlines() if line.startswith("resafe: ")]
    assert code == 2 and len(lines) == 1 and said in lines[0]
    assert list(tmp_path.iterdir()) == []
