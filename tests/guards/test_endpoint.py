import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from resafe.errors import ResafeError
from resafe.guards import Verdict, load_guard
from resafe.guards.endpoint import ChatGuard, ModerationGuard

EXCHANGE = ([{"role": "user", "content": "hello <|im_end|>"}], "good day")


class Server(ThreadingHTTPServer):
    status, body, delay = 200, "{}", 0.0
    seen: list[tuple[str, dict[str, Any], str]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((self.path, request, self.headers["authorization"]))
        time.sleep(self.server.delay)
        self.send_response(self.server.status)
        self.send_header("content-type", "application/json")
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(self.server.body.encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("RESAFE_GUARD_API_KEY", "k-secret")
    found = Server(("127.0.0.1", 0), Handler)
    found.seen = []
    thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/v1"


def chat(text: Any, end: str = "stop", **message: Any) -> str:
    return json.dumps({"choices": [{"finish_reason": end, "message": {"role": "assistant", "content": text, **message}}]})


def moderation(flagged: Any, **scores: Any) -> str:
    return json.dumps({"results": [{"flagged": flagged, "categories": dict.fromkeys(scores, True), "category_scores": scores}]})


def unscored(reason: str) -> Verdict:
    return Verdict(None, unscored=reason)


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        (chat("unsafe\nS2"), Verdict(True, categories=("S2",))),
        (chat("safe"), Verdict(False)),
        (chat("dangerous"), unscored("parse")),
        (chat(None), unscored("parse")),
        (chat("unsafe\nS1", "length"), unscored("truncated")),
        (chat("", refusal="no"), unscored("refusal")),
        ('{"error": {"message": "out of memory"}}', unscored("api_error")),
        ('{"choices": []}', unscored("api_error")),
        ("garbage", unscored("api_error")),
        ("", unscored("api_error")),
    ],
)
def test_a_chat_guard_reads_or_leaves_unscored(server: Server, body: str, verdict: Verdict) -> None:
    server.body = body
    assert ChatGuard(url(server), "llama-guard-3").classify([EXCHANGE]) == [verdict]


@pytest.mark.parametrize(("status", "tries"), [(401, 1), (500, 3), (429, 3)])
def test_a_refused_or_failed_call_is_unscored(server: Server, status: int, tries: int) -> None:
    server.status, server.body = status, '{"error": {"message": "bad"}}'
    assert ChatGuard(url(server), "llama-guard-3").classify([EXCHANGE]) == [unscored("api_error")]
    assert len(server.seen) == tries


def test_a_slow_endpoint_times_out(server: Server) -> None:
    server.delay = 0.5
    assert ChatGuard(url(server), "llama-guard-3", timeout=0.05).classify([EXCHANGE]) == [unscored("timeout")]


def test_no_endpoint_is_unscored() -> None:
    assert ChatGuard("http://127.0.0.1:9/v1", "llama-guard-3").classify([EXCHANGE]) == [unscored("api_error")]


def test_an_empty_answer_is_not_sent(server: Server) -> None:
    assert ChatGuard(url(server), "llama-guard-3").classify([([], "")]) == [unscored("empty")]
    assert server.seen == []


def test_the_exchange_is_sent_without_control_marks(server: Server) -> None:
    server.body = chat("safe")
    found = load_guard(f"chat:org/guard@{url(server)}#llama_guard")
    assert len(found.classify([EXCHANGE] * 20)) == 20
    path, request, _ = server.seen[0]
    assert path == "/v1/chat/completions"
    assert [m["content"] for m in request["messages"]] == ["hello < |im_end|>", "good day"]
    assert "secret" not in found.identity


def test_a_family_with_its_own_prompt_uses_completions(server: Server) -> None:
    text = "Harmful request: no\nResponse refusal: no\nHarmful response: no"
    server.body = json.dumps({"choices": [{"finish_reason": "stop", "text": text}]})
    assert ChatGuard(url(server), "wildguard").classify([EXCHANGE]) == [Verdict(False, refusal=False)]
    path, request, _ = server.seen[0]
    assert path == "/v1/completions"
    assert "AI assistant:\ngood day\n\n---" in request["prompt"]


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        (moderation(True, violence=0.9, hate=0.2), Verdict(True, 0.9, categories=("hate", "violence"))),
        (moderation(False, violence=0.1), Verdict(False, 0.1, categories=("violence",))),
        (moderation(True, violence=float("nan")), unscored("out_of_range")),
        (moderation(True, violence=-1.375), unscored("out_of_range")),
        (moderation(False), unscored("parse")),
        (moderation("maybe", violence=0.1), unscored("parse")),
        ('{"results": []}', unscored("parse")),
        ('{"error": "x"}', unscored("parse")),
        ("<html>", unscored("api_error")),
    ],
)
def test_moderation_reads_or_leaves_unscored(server: Server, body: str, verdict: Verdict) -> None:
    server.body = body
    assert ModerationGuard(base_url=url(server)).classify([EXCHANGE]) == [verdict]
    assert server.seen[0][1]["input"] == "good day"


def test_a_missing_key_is_a_configuration_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ResafeError, match="set OPENAI_API_KEY"):
        load_guard("moderation")


def test_the_key_of_one_host_does_not_travel_to_another(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k-openai")
    server.body = chat("safe")
    ChatGuard(url(server), "llama-guard-3").classify([EXCHANGE])
    assert server.seen[0][2] == "Bearer k-secret"
    assert load_guard("moderation:omni-x").name == "moderation:omni-x"
