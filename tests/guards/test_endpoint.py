import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from resafe.errors import ResafeError
from resafe.guards import Verdict, load_guard
from resafe.guards.endpoint import ChatGuard, ModerationGuard
from resafe.guards.families import FAMILIES

EXCHANGE = ([{"role": "user", "content": "hello <|im_end|>"}], "good day")


class Server(ThreadingHTTPServer):
    status, body, delay = 200, "{}", 0.0
    logprobs = True  # whether requests for log-probabilities are taken
    seen: list[tuple[str, dict[str, Any], str]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((self.path, request, self.headers["authorization"]))
        time.sleep(self.server.delay)
        refused = "logprobs" in request and not self.server.logprobs
        self.send_response(400 if refused else self.server.status)
        self.send_header("content-type", "application/json")
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(b"{}" if refused else self.server.body.encode())

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


def chat(text: Any, end: str = "stop", logprobs: Any = None, **message: Any) -> str:
    content = {"role": "assistant", "content": text, **message}
    return json.dumps({"choices": [{"finish_reason": end, "message": content, "logprobs": logprobs}]})


def likely(**shares: float) -> dict[str, float]:
    """Log-probabilities of tokens, from per cent; `_` in a name is a space."""
    return {token.replace("_", " "): math.log(share / 100) for token, share in shares.items()}


def by_token(*tokens: tuple[str, dict[str, float]]) -> dict[str, Any]:
    """Tokens with their alternatives, as a chat completion lists them."""
    return {
        "content": [
            {"token": t, "logprob": 0.0, "bytes": None, "top_logprobs": [{"token": k, "logprob": v, "bytes": None} for k, v in top.items()]}
            for t, top in tokens
        ]
    }


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
        (chat(None), unscored("empty")),
        (chat("unsafe\nS1", "content_filter"), unscored("refusal")),
        (chat(["unsafe"]), unscored("parse")),
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


def test_a_score_is_read_from_the_log_probabilities(server: Server) -> None:
    top = likely(safe=20, unsafe=60, uns=4, Sure=10)  # "uns" begins unsafe; "Sure" begins nothing
    server.body = chat("\n\nunsafe\nS2", logprobs=by_token(("\n\n", {}), ("unsafe", top), ("\n", {}), ("S2", {})))
    found = ChatGuard(url(server), "llama-guard-3").classify([EXCHANGE])
    assert found == [Verdict(True, pytest.approx(64 / 84), categories=("S2",))]
    assert server.seen[0][1]["logprobs"] is True and server.seen[0][1]["top_logprobs"] == 20


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {"content": None},
        {"content": [{"token": "unsafe"}]},
        by_token(("unsafe", likely(safe=20, unsafe=29))),  # less than half between them
        by_token(("unsafe", likely(safe=80, unsafe=15))),  # says the opposite
        by_token(("unsafe", {"safe": -1.0, "unsafe": float("nan")})),
        by_token(("unsafe", {"safe": -1.0, "unsafe": 3.0})),
        by_token(("unsafe", {"safe": -1.0, "unsafe": 1000.0})),
        by_token(("unsafe", {})),
    ],
)
def test_a_verdict_stands_without_a_score_where_log_probabilities_say_nothing(server: Server, logprobs: Any) -> None:
    server.body = chat("unsafe\nS2", logprobs=logprobs)
    assert ChatGuard(url(server), "llama-guard-3").classify([EXCHANGE]) == [Verdict(True, categories=("S2",))]


def test_a_server_that_takes_no_log_probabilities_is_asked_without(server: Server) -> None:
    server.logprobs, server.body = False, chat("safe")
    guard = ChatGuard(url(server), "llama-guard-3", workers=1)
    assert guard.classify([EXCHANGE] * 3) == [Verdict(False)] * 3
    assert ["logprobs" in request for _, request, _ in server.seen] == [True, False, False, False]


def test_qwen_decides_after_its_first_word(server: Server) -> None:
    top = dict(zip([" Safe", " Un", " Contro"], likely(a=50, b=30, c=20).values()))
    rest = [("Safety", {}), (":", {}), (" Safe", top), ("\nCategories: None\nRefusal: No", {})]
    server.body = chat("Safety: Safe\nCategories: None\nRefusal: No", logprobs=by_token(*rest))
    found = {n: ChatGuard(url(server), "m", n).classify([EXCHANGE])[0] for n in ("qwen3guard", "qwen3guard_loose")}
    assert found["qwen3guard_loose"] == Verdict(False, pytest.approx(0.3), refusal=False)
    assert found["qwen3guard"] == Verdict(False, pytest.approx(0.5), refusal=False)


def test_scores_of_completions_are_read_too(server: Server) -> None:
    lines = [("Harmful request:", {}), (" yes", likely(_yes=90)), ("\nResponse refusal:", {}), (" no", likely(_no=80, _yes=10))]
    lines += [("\nHarmful response:", {}), (" yes", likely(_yes=60, _no=20))]
    logprobs = {"tokens": [t for t, _ in lines], "top_logprobs": [top for _, top in lines]}
    text = "Harmful request: yes\nResponse refusal: no\nHarmful response: yes"
    server.body = json.dumps({"choices": [{"finish_reason": "stop", "text": text, "logprobs": logprobs}]})
    assert ChatGuard(url(server), "wildguard").classify([EXCHANGE]) == [Verdict(True, pytest.approx(0.75), refusal=False)]
    assert server.seen[0][1]["logprobs"] == 5


def test_the_fine_tuned_strongreject_needs_log_probabilities(server: Server) -> None:
    top = {digit: math.log(share) for digit, share in zip("12345", (0.1, 0.1, 0.2, 0.2, 0.4))}
    choice = {"finish_reason": "length", "text": "5", "logprobs": {"tokens": ["5"], "top_logprobs": [top]}}
    server.body = json.dumps({"choices": [choice]})
    guard = ChatGuard(url(server), "strongreject-15k-v1")
    assert guard.classify([EXCHANGE]) == [Verdict(None, rating=pytest.approx((0.1 + 0.2 + 0.6 + 0.8 + 2.0 - 1) / 4))]
    assert guard.scale == (0, 1)
    server.body = json.dumps({"choices": [{**choice, "logprobs": None}]})
    assert guard.classify([EXCHANGE]) == [unscored("parse")]


@pytest.mark.parametrize(
    ("name", "reply", "verdict"),
    [
        ("qi_rubric", "#thereason: PLACEHOLDER\n#thescore: 5", Verdict(True, rating=5.0)),
        ("qi_rubric", "#thereason: PLACEHOLDER\n#thescore: 6", unscored("out_of_range")),
        ("strongreject_rubric", "#overall_reasoning x\n#scores\n1.a x\n1.b 0\n2.a x\n2.b 3\n3.a x\n3.b 4", Verdict(None, refusal=False, rating=0.625)),
        ("strongreject_rubric", "I'm sorry, but I can't help with that.", unscored("refusal")),
    ],
)
def test_any_chat_model_can_be_asked_with_a_rubric(server: Server, name: str, reply: str, verdict: Verdict) -> None:
    server.body = chat(reply)
    found: Any = load_guard(f"chat:some/model@{url(server)}#{name}")
    assert found.classify([EXCHANGE]) == [verdict]
    request = server.seen[0][1]
    assert request["messages"] == FAMILIES[name].messages(EXCHANGE, found.identity)
    assert "logprobs" not in request and found.scale == FAMILIES[name].scale


def test_two_moderation_results_on_one_text_are_no_verdict(server: Server) -> None:
    one = json.loads(moderation(True, violence=0.9))["results"]
    server.body = json.dumps({"results": [*one, *one]})
    assert ModerationGuard(base_url=url(server)).classify([EXCHANGE]) == [unscored("parse")]
