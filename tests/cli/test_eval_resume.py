"""`resafe eval`, killed and called again, goes on; --store says where answers are kept."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from resafe.store import Log

MAIN = [sys.executable, "-c", "from resafe.cli import main; main()"]


def command(store: Path | str, output: Path) -> list[str]:
    suites = ["--suite", "lab_harm", "--suite", "lab_borderline", "--suite", "lab_skills"]
    return [*MAIN, "eval", "lab", *suites, "--batch-size", "2", "--store", str(store), "--output", str(output)]


def kept(store: Path) -> dict[str, object]:
    found = {}
    for file in store.glob("answers/*.log"):
        with Log(file) as log:
            found |= {address: log.get(address) for address in log if address != "about"}
    return found


def test_a_killed_evaluation_goes_on_and_loses_no_answer(tmp_path: Path) -> None:
    store, output, rng = tmp_path / "store", tmp_path / "out", random.Random(3)
    before: dict[str, object] = {}
    for _ in range(3):
        running = subprocess.Popen(command(store, output), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        while running.poll() is None and len(kept(store)) <= len(before):
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.4))
        os.kill(running.pid, signal.SIGKILL)
        running.communicate()
        assert not (output / "results.json").exists(), "killed too late to show anything"
        now = kept(store)
        assert len(now) > len(before) and all(now[a] == value for a, value in before.items())
        before = now
    done = subprocess.run(command(store, output), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    target = json.loads((output / "items.json").read_text())["meta"]["targets"]["aligned"]
    assert target["reused"] == len(before) and target["answers"] == 600


def test_store_none_keeps_nothing(tmp_path: Path) -> None:
    args = [*MAIN, "eval", "lab", "--suite", "lab_harm", "--limit", "4", "--store", "none"]
    done = subprocess.run(args, capture_output=True, text=True, timeout=300, env={**os.environ, "RESAFE_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache" / "store").exists()
