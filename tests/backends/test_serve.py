"""The endpoint back-end against a real server: `transformers serve` with the lab model, on this machine's CPU."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from resafe import lab
from resafe.backends import Request, Sampling
from resafe.backends.endpoint import EndpointBackend
from resafe.errors import ResafeError
from resafe.generate import Answer, generate
from resafe.lab.suites import suite_rows
from resafe.models import load

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


def prompts(n: int) -> list[str]:
    """Harmful, borderline and skill prompts in turn."""
    suites = [suite_rows(s, n=n) for s in ("lab_harm", "lab_borderline", "lab_skills", "lab_note")]
    return [rows[i]["prompt"] for i in range(n) for rows in suites][:n]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        str(lab.resolve("lab")),
        "--host",
        "127.0.0.1",
    ]
    settings = ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as out:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen([*command, *settings], stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except urllib.error.URLError:
            time.sleep(0.2)
    pytest.fail(f"transformers serve did not start: {log.read_text()[-2000:]}")


def ask(text: str, n: int = 40, sampling: Sampling | None = None) -> Request:
    return Request([{"role": "user", "content": text}], n, sampling or Sampling())


def test_greedy_answers_are_those_of_the_model_on_disk(url: str) -> None:
    asked = prompts(20)
    served = dict(EndpointBackend(str(lab.resolve("lab")), url, workers=4).stream([ask(p) for p in asked]))
    local = generate(load(lab.resolve("lab")), [[{"role": "user", "content": p}] for p in asked], max_new_tokens=40)
    assert len({a.text for a in local}) > 10
    # This server counts the end-of-turn token that a local model's count leaves out.
    assert [served[i] for i in range(20)] == [Answer(a.text, a.tokens + a.finished, a.finished) for a in local]


def test_an_answer_cut_by_the_limit_is_not_finished(url: str) -> None:
    (found,) = dict(EndpointBackend(str(lab.resolve("lab")), url).stream([ask(prompts(1)[0], n=3)])).values()
    assert (found.tokens, found.finished, found.error) == (3, False, "")


def test_this_server_cannot_continue_a_turn_and_is_not_asked_to(url: str) -> None:
    request = Request([{"role": "user", "content": prompts(1)[0]}, {"role": "assistant", "content": "sure"}])
    found = dict(EndpointBackend(str(lab.resolve("lab")), url).stream([request, ask(prompts(1)[0])]))
    assert found[0] == Answer(error="prefill_unsupported")
    assert found[1].text


def test_a_model_that_is_not_served_is_one_line(url: str) -> None:
    with pytest.raises(ResafeError, match="Server is pinned to"):
        list(EndpointBackend("another", url).stream([ask(p) for p in prompts(5)]))
