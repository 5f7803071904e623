"""Records are there once `put` returns, whatever happens to the process; what is torn or damaged is never served."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resafe.errors import ResafeError
from resafe.store import Log, Store

WRITER = """
import sys
from pathlib import Path
from resafe.store import Log
log = Log(Path(sys.argv[1]))
start = len(log)
for i in range(start, start + 100_000):
    log.put(f"row {i}", {"text": "x" * (i % 700), "n": i})
    sys.stdout.write(f"{i}\\n")
    sys.stdout.flush()
"""


def test_what_was_put_is_read_back_by_the_next_process(tmp_path: Path) -> None:
    with Log(tmp_path / "a.log") as log:
        log.put("one", {"text": "line\nbreak é", "n": 1})
        log.put("two", [1, 2.5, None])
        log.put("one", {"text": "newer"})
    again = Log(tmp_path / "a.log")
    assert again.get("one") == {"text": "newer"} and again.get("two") == [1, 2.5, None]
    assert again.get("three") is None and "three" not in again and len(again) == 2


@pytest.mark.parametrize("cut", [1, 2, 10, 40])
def test_a_torn_last_line_is_cut_off_and_the_rest_kept(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "a.log"
    with Log(file) as log:
        log.put("one", 1)
        log.put("two", "a long enough value to be cut")
    file.write_bytes(file.read_bytes()[:-cut])
    torn = Log(file)
    assert torn.get("one") == 1 and "two" not in torn and torn.damaged == 1
    torn.put("three", 3)
    whole = Log(file)
    assert (whole.get("one"), whole.get("three"), whole.damaged) == (1, 3, 0) and "two" not in whole


def test_any_changed_byte_makes_a_record_vanish_and_never_another_value(tmp_path: Path) -> None:
    file = tmp_path / "a.log"
    with Log(file) as log:
        log.put("one", "value")
        end = file.stat().st_size
        log.put("two", 2)
    content = file.read_bytes()
    for i in range(end):
        damaged = bytearray(content)
        damaged[i] ^= 1
        file.write_bytes(bytes(damaged))
        found = Log(file)
        assert "one" not in found, i
        assert found.get("two") == 2 or i == end - 1, i  # a changed line end joins both lines
        found.close()


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    log = Store(tmp_path / "store").log("answers", "model")
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.path.parent.stat().st_mode) == 0o700


def test_another_identity_never_sees_a_record(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.log("answers", "model a").put("address", "text")
        assert store.log("answers", "model a").get("address") == "text"
        assert "address" not in store.log("answers", "model b") and "address" not in store.log("verdicts", "model a")


def test_a_run_is_forgotten_and_nothing_else(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for kind, identity in (("answers", "model a"), ("answers", ["served", "x", "run 1"]), ("verdicts", ["served", "j", "run 1"]), ("answers", ["served", "x", "run 2"])):
            store.log(kind, identity).put("address", 1)
        store.forget_run("run 1")
        assert "address" not in store.log("answers", ["served", "x", "run 1"]) and "address" not in store.log("verdicts", ["served", "j", "run 1"])
        assert "address" in store.log("answers", "model a") and "address" in store.log("answers", ["served", "x", "run 2"])


def test_a_full_disk_keeps_what_was_whole_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(tmp_path / "a.log")
    log.put("one", 1)
    real = os.write

    def full(fd: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return real(fd, data[:10])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(ResafeError, match="No space left on device"):
            log.put("two", "x" * 100)
    assert "two" not in log
    log.put("three", 3)
    again = Log(tmp_path / "a.log")
    assert (again.get("one"), again.get("three"), again.damaged) == (1, 3, 0)


def test_a_store_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    log = Store(tmp_path)._path("answers", "m")
    log.mkdir()
    with pytest.raises(ResafeError, match="cannot be opened.*--store"):
        Store(tmp_path).log("answers", "m")


def test_two_processes_append_to_one_file(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from resafe.store import Log\nlog = Log(Path(sys.argv[1]))\nfor i in range(300): log.put(f'{sys.argv[2]} {i}', i)"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a.log"), name]) for name in "ab"]
    assert [w.wait() for w in writers] == [0, 0]
    found = Log(tmp_path / "a.log")
    assert found.damaged == 0 and all(found.get(f"{name} {i}") == i for name in "ab" for i in range(300))


def test_no_completed_record_is_lost_in_two_hundred_kills(tmp_path: Path) -> None:
    """A writer is killed (SIGKILL) at random moments; every record that it had reported is there, and nothing else is damaged."""
    file, rng, reported = tmp_path / "a.log", random.Random(0), 0
    for kill in range(200):
        # forked, not started anew: two hundred interpreter starts would take minutes
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(write, 1)
            sys.argv = ["writer", str(file)]
            sys.stdout = os.fdopen(1, "w")
            exec(WRITER, {})
            os._exit(1)
        os.close(write)
        time.sleep(rng.uniform(0.0005, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            numbers = [int(line) for line in pipe.read().splitlines(keepends=True) if line.endswith("\n")]
        reported = max([reported, *(n + 1 for n in numbers)])
        with Log(file) as log:
            assert log.damaged <= 1, kill  # the line that was being written
            missing = [n for n in numbers if log.get(f"row {n}") != {"text": "x" * (n % 700), "n": n}]
            assert not missing, (kill, missing[:3])
            assert len(log) >= reported
    assert reported > 1000
