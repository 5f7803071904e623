import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from resafe.backends import Request, Sampling
from resafe.backends import endpoint as module
from resafe.backends._pool import Pace, as_finished
from resafe.backends._wire import Fault, _after, explained, refusal, request_seed
from resafe.backends.endpoint import EndpointBackend
from resafe.errors import ResafeError
from resafe.generate import Answer
from tests.backends.server import Call, Reply, Server, chat, refused, serving


def ask(text: str, **options: Any) -> Request:
    return Request([{"role": "user", "content": text}], **options)


def prefill(text: str) -> Request:
    return Request([{"role": "user", "content": "go on"}, {"role": "assistant", "content": text}])


def answers(backend: EndpointBackend, requests: list[Request]) -> list[Answer]:
    found = dict(backend.stream(requests))
    return [found[i] for i in range(len(requests))]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.001)
    for name in ("OPENAI_API_KEY", "RESAFE_API_KEY", "OPENAI_ORG_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Call], Reply]], Server]]:
    with ExitStack() as stack:
        yield lambda script: stack.enter_context(serving(script))


Serve = Callable[[Callable[[Call], Reply]], Server]


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (chat(" fine \n"), Answer("fine", 3, True)),
        (chat("cut", "length"), Answer("cut", 3, False)),
        (chat("cut", "content_filter"), Answer(error="content_filter")),
        (chat("x", None), Answer(error="api_error")),
        (chat("", tokens=1), Answer("", 1, True)),
        (chat("", tokens=0), Answer(error="empty")),
        (chat(None), Answer(error="empty")),
        (chat(None, "length", reasoning_content="let me see"), Answer(error="truncated")),
        (chat("", "length", reasoning="let me see"), Answer(error="truncated")),
        (chat("four", reasoning_content="two and two"), Answer("four", 3, True)),
        (chat(None, refusal="I cannot."), Answer("I cannot.", 3, True)),
        (
            chat([{"type": "thinking", "text": "hm"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
            Answer("ab", 3, True),
        ),
        (chat(5), Answer(error="parse")),
        (chat(["a"]), Answer(error="parse")),
        (chat("a", tokens="many"), Answer("a", 0, True)),
        ({"choices": [{"finish_reason": "stop", "message": {"content": "a"}}]}, Answer("a", 0, True)),
        ({"choices": []}, Answer(error="parse")),
        ([], Answer(error="parse")),
        (None, Answer(error="parse")),
        ({"error": {"message": "out of memory"}}, Answer(error="parse")),
        (b"<html>", Answer(error="parse")),
        (b"\xff\xfe\x00", Answer(error="parse")),
        (b"", Answer(error="parse")),
    ],
)
def test_a_reply_is_an_answer_or_the_reason_why_not(serve: Serve, body: Any, answer: Answer) -> None:
    server = serve(lambda call: Reply(body))
    assert answers(EndpointBackend("m", server.url), [ask("a")]) == [answer]
    assert len(server.calls) == 1


def test_a_greedy_request_says_so_and_no_more(serve: Serve) -> None:
    server = serve(lambda call: Reply(chat("a")))
    request = Request([{"role": "user", "content": "a", "id": "row 7"}], max_new_tokens=9)  # type: ignore[typeddict-unknown-key]
    answers(EndpointBackend("m", server.url), [request])
    assert server.calls[0].path == "/v1/chat/completions"
    assert server.calls[0].json == {
        "model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 9, "temperature": 0.0,
    }  # fmt: skip


def test_a_sampled_request_brings_its_own_seed(serve: Serve) -> None:
    server = serve(lambda call: Reply(chat("a")))
    requests = [ask(t, sampling=Sampling(0.7, 0.9, s)) for t, s in (("a", 0), ("b", 0), ("a", 1), ("a", 0))]
    answers(EndpointBackend("m", server.url, workers=1), requests)
    sent = [c.json for c in server.calls]
    assert [(s["temperature"], s["top_p"]) for s in sent] == [(0.7, 0.9)] * 4
    seeds = [s["seed"] for s in sent]
    assert seeds == [request_seed(r) for r in requests]
    assert seeds[0] == seeds[3] and len(set(seeds)) == 3 and all(0 <= s < 2**31 for s in seeds)


def test_answers_come_in_the_order_in_which_they_finish(serve: Serve) -> None:
    second = threading.Event()

    def script(call: Call) -> Reply:
        if call.prompt == "slow":
            assert second.wait(30)
        return Reply(chat(call.prompt))

    stream = EndpointBackend("m", serve(script).url, workers=2).stream([ask("slow"), ask("quick")])
    assert next(stream) == (1, Answer("quick", 3, True))
    second.set()
    assert list(stream) == [(0, Answer("slow", 3, True))]


def test_no_more_requests_are_under_way_than_there_are_workers(serve: Serve) -> None:
    together, most, lock = 0, 0, threading.Lock()
    full = threading.Barrier(3)

    def script(call: Call) -> Reply:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        full.wait(30)  # nobody gets an answer before three are asking
        with lock:
            together -= 1
        return Reply(chat("a"))

    assert len(answers(EndpointBackend("m", serve(script).url, workers=3), [ask(str(i)) for i in range(12)])) == 12
    assert most == 3


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_a_passing_fault_is_retried(serve: Serve, status: int) -> None:
    server = serve(lambda call: refused(status) if len(server.calls) < 3 else Reply(chat("a")))
    assert answers(EndpointBackend("m", server.url, retries=2), [ask("a")]) == [Answer("a", 3, True)]
    assert len(server.calls) == 3


def test_a_fault_that_stays_is_no_answer(serve: Serve) -> None:
    told: list[str] = []
    server = serve(lambda call: refused(500, "boom"))
    backend = EndpointBackend("m", server.url, retries=1, log=told.append)
    assert answers(backend, [ask("a"), ask("b")]) == [Answer(error="api_error")] * 2
    assert len(server.calls) == 4
    assert told == [f"chat:m@127.0.0.1:{server.server_port}/v1: no answer (api_error: boom)"]


def test_a_lost_connection_is_retried(serve: Serve) -> None:
    short = Reply(chat("a"), headers={"content-length": "9999", "connection": "close"})
    server = serve(lambda call: short if len(server.calls) < 2 else Reply(chat("a")))
    assert answers(EndpointBackend("m", server.url, timeout=5), [ask("a")]) == [Answer("a", 3, True)]


def test_what_does_not_come_in_time_is_a_timeout(serve: Serve) -> None:
    end = threading.Event()
    server = serve(lambda call: Reply(chat("a")) if end.wait(30) else Reply())
    assert answers(EndpointBackend("m", server.url, timeout=0.1, retries=1), [ask("a")]) == [Answer(error="timeout")]
    end.set()


def test_timeouts_are_retried_less_often_than_other_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = list[str]()

    def late(self: EndpointBackend, request: Request, *_: Any) -> None:
        tries.append(str(request.messages[0]["content"]))
        raise Fault(tries[-1], "no reply")

    monkeypatch.setattr(EndpointBackend, "_post", late)
    found = answers(EndpointBackend("m", "http://x/v1", retries=6), [ask("timeout"), ask("api_error")])
    assert found == [Answer(error="timeout"), Answer(error="api_error")]
    assert (tries.count("timeout"), tries.count("api_error")) == (3, 7)


def test_a_server_that_asks_for_an_hour_is_not_waited_for(serve: Serve) -> None:
    server = serve(lambda call: Reply({"error": {"message": "later"}}, 429, {"retry-after": "3600"}))
    assert answers(EndpointBackend("m", server.url), [ask("a")]) == [Answer(error="api_error")]
    assert len(server.calls) == 1


def test_a_wait_that_the_server_asks_for_holds_everybody_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(Pace, "pause", lambda self, seconds: pauses.append(seconds))
    ask_for = Reply({"error": {"message": "slowly"}}, 429, {"retry-after": "0.02"})
    server = serve(lambda call: ask_for if len(server.calls) < 2 else Reply(chat("a")))
    assert answers(EndpointBackend("m", server.url), [ask("a")]) == [Answer("a", 3, True)]
    assert pauses == [0.02]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"retry-after": "2"}, 2.0), ({"retry-after": "9", "retry-after-ms": "500"}, 0.5), ({}, None), ({"retry-after": "soon"}, None),
     ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0)],
)  # fmt: skip
def test_retry_after_is_seconds_milliseconds_or_a_date(headers: dict[str, str], seconds: float | None) -> None:
    assert _after(headers) == seconds


def test_requests_are_spaced_evenly_and_pauses_add_up() -> None:
    now = 100.0
    pace = Pace(30, clock=lambda: now)
    assert [pace.take() for _ in range(3)] == [0.0, 2.0, 4.0]
    now = 105.0
    assert pace.take() == 1.0
    pace.pause(10)
    assert [pace.take(), pace.take()] == [10.0, 12.0]
    free = Pace(None, clock=lambda: now)
    assert [free.take(), free.take()] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        (refused(401, "wrong key k-secret"), "does not accept the key .HTTP 401.: set RESAFE_API_KEY"),
        (refused(403, "not for you"), "refuses to answer as m .HTTP 403: not for you"),
        (refused(404, "no such model"), "knows no model 'm' .*no such model.*/v1"),
        (Reply({}, 307, {"location": "http://127.0.0.1:1/v1"}), "redirects elsewhere .HTTP 307"),
        (refused(429, "no money", code="insufficient_quota"), "no money"),
    ],
)
def test_what_no_request_can_get_past_ends_the_stream(serve: Serve, reply: Reply, line: str) -> None:
    server = serve(lambda call: reply)
    with pytest.raises(ResafeError, match=line) as error:
        answers(EndpointBackend("m", server.url, workers=2), [ask(str(i)) for i in range(50)])
    assert len(server.calls) <= 4
    assert "\n" not in str(error.value)


def test_a_redirect_takes_no_prompt_along(serve: Serve) -> None:
    other = serve(lambda call: Reply(chat("a")))
    server = serve(lambda call: Reply({}, 308, {"location": f"{other.url}/chat/completions"}))
    with pytest.raises(ResafeError, match="redirects"):
        answers(EndpointBackend("m", server.url), [ask("a")])
    assert other.calls == []


def test_no_server_is_said_at_once() -> None:
    with pytest.raises(
        ResafeError, match="127.0.0.1:9/v1 cannot be reached .*start the server, or correct the address"
    ):
        answers(EndpointBackend("m", "http://127.0.0.1:9/v1"), [ask("a")])


def test_two_requests_refused_alike_before_any_answer_mean_that_all_will_be(serve: Serve) -> None:
    server = serve(lambda call: refused(400, "temperature 0 is not supported"))
    with pytest.raises(ResafeError, match="temperature 0 is not supported"):
        answers(EndpointBackend("m", server.url, workers=1), [ask(str(i)) for i in range(9)])
    assert len(server.calls) == 2


def test_single_requests_may_be_refused(serve: Serve) -> None:
    by_prompt = {
        "ok": Reply(chat("a")),
        "odd": refused(400, "odd"),
        "long": refused(400, "maximum context length is 9 tokens", code="context_length_exceeded"),
        "bad": refused(400, "filtered", code="content_filter"),
        "flagged": refused(403, "your input was flagged"),
        "gateway": refused(504),
    }
    server = serve(lambda call: by_prompt[call.prompt])
    found = answers(EndpointBackend("m", server.url, retries=0, workers=1), [ask(p) for p in (*by_prompt, "odd")])
    errors = ["", "api_error", "too_long", "content_filter", "content_filter", "timeout", "api_error"]
    assert [a.error for a in found] == errors


def test_the_newer_name_of_the_limit_is_learnt_once(serve: Serve) -> None:
    words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    server = serve(lambda call: refused(400, words) if "max_tokens" in call.json else Reply(chat("a")))
    backend = EndpointBackend("m", server.url, workers=1, retries=0)
    assert answers(backend, [ask(str(i), max_new_tokens=7) for i in range(5)]) == [Answer("a", 3, True)] * 5
    assert len(server.calls) == 6
    assert server.calls[-1].json["max_completion_tokens"] == 7


def test_openai_is_asked_by_the_newer_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k-openai")
    assert EndpointBackend("m")._limit == "max_completion_tokens"


def test_leaving_early_asks_for_nothing_more(serve: Serve) -> None:
    block = threading.Event()

    def script(call: Call) -> Reply:
        if call.prompt != "0":
            block.wait(30)
        return Reply(chat("a"))

    server = serve(script)
    stream = EndpointBackend("m", server.url, workers=2).stream([ask(str(i)) for i in range(40)])
    assert next(stream)[0] == 0
    stream.close()  # type: ignore[attr-defined]
    block.set()
    for thread in [t for t in threading.enumerate() if "(run)" in t.name]:
        thread.join(30)
    assert len(server.calls) <= 3


def test_waiting_for_the_next_try_ends_when_nobody_asks_any_more(serve: Serve) -> None:
    late, now = threading.Event(), threading.Event()

    def script(call: Call) -> Reply:
        mine, other = (late, now) if call.prompt == "late" else (now, late)
        mine.set()
        assert other.wait(30)  # both are sent before either is answered
        if mine is late:
            return Reply({"error": {"message": "later"}}, 503, {"retry-after": "500"})
        return Reply(chat("a"))

    server = serve(script)
    stream = EndpointBackend("m", server.url, workers=2).stream([ask("late"), ask("now")])
    assert next(stream)[0] == 1
    stream.close()  # type: ignore[attr-defined]
    waiting = [t for t in threading.enumerate() if "(run)" in t.name]
    for thread in waiting:
        thread.join(60)
    assert not any(t.is_alive() for t in waiting)
    assert [c.prompt for c in server.calls].count("late") == 1


def test_the_pool_begins_no_job_that_nobody_waits_for() -> None:
    begun, left = list[int](), threading.Event()

    def work(job: int, stop: threading.Event) -> int:
        begun.append(job)
        if job:
            left.wait(30)
        return job

    results = as_finished(range(9), work, workers=1)
    assert next(results) == (0, 0)
    results.close()  # type: ignore[attr-defined]
    threads = [t for t in threading.enumerate() if "(run)" in t.name]
    left.set()
    for thread in threads:
        thread.join(30)
    assert begun in ([0], [0, 1])


def test_a_server_that_leaves_the_turn_open_continues_it(serve: Serve) -> None:
    def script(call: Call) -> Reply:
        return Reply(chat("four", prompt=10 if call.json.get("continue_final_message") else 14))

    server = serve(script)
    backend = EndpointBackend("m", server.url)
    assert answers(backend, [prefill("one"), ask("a"), prefill("two")]) == [Answer("four", 3, True)] * 3
    sent = [c.json for c in server.calls[2:]]
    assert len(sent) == 3  # after the two of the test
    for body in sent:
        is_open = body["messages"][-1]["role"] == "assistant"
        assert (body.get("continue_final_message"), body.get("add_generation_prompt")) == (
            (True, False) if is_open else (None, None)
        )
    answers(backend, [prefill("three")])
    assert len(server.calls) == 6  # not tested again


def test_a_server_that_refuses_only_closed_turns_has_understood(serve: Serve) -> None:
    server = serve(
        lambda c: Reply(chat("a")) if c.json.get("continue_final_message") else refused(400, "last role must be user")
    )
    assert answers(EndpointBackend("m", server.url), [prefill("one")]) == [Answer("a", 3, True)]


@pytest.mark.parametrize(
    "reply",
    [Reply(chat("from scratch")), Reply(chat("a", prompt=None)), refused(400, "unknown field"), Reply({"detail": "unexpected"}, 422), refused(500), Reply([])],
    ids=["ignores", "does not tell", "refuses", "refuses otherwise", "fails", "garbles"],
)  # fmt: skip
def test_an_answer_from_scratch_never_passes_for_a_continuation(serve: Serve, reply: Reply) -> None:
    server = serve(lambda c: reply if c.json["messages"][-1]["role"] == "assistant" else Reply(chat("hello")))
    found = answers(EndpointBackend("m", server.url, retries=0), [prefill("one"), ask("a")])
    assert found == [Answer(error="prefill_unsupported"), Answer("hello", 3, True)]
    assert not any(c.prompt == "one" for c in server.calls)


def test_what_was_learnt_about_continuing_is_kept_only_if_it_is_certain(serve: Serve) -> None:
    server = serve(lambda call: refused(500) if len(server.calls) == 1 else refused(422))
    backend = EndpointBackend("m", server.url, retries=0)
    for calls in (1, 2, 2):  # failed, refused, known
        assert answers(backend, [prefill("one")]) == [Answer(error="prefill_unsupported")]
        assert len(server.calls) == calls


def test_a_wrong_key_shows_in_the_test_for_continuation_too(serve: Serve) -> None:
    with pytest.raises(ResafeError, match="set RESAFE_API_KEY"):
        answers(EndpointBackend("m", serve(lambda c: refused(401)).url), [prefill("one")])


def test_openais_key_and_account_stay_with_openai(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("OPENAI_API_KEY", "k-openai"), ("OPENAI_ORG_ID", "o-1"), ("OPENAI_PROJECT_ID", "p-1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer k-custom")
    server = serve(lambda call: Reply(chat("a")))
    answers(EndpointBackend("m", server.url), [ask("a")])
    monkeypatch.setenv("RESAFE_API_KEY", "k-other")
    answers(EndpointBackend("m", server.url), [ask("a")])
    assert [c.headers["authorization"] for c in server.calls] == ["Bearer none", "Bearer k-other"]
    for call in server.calls:
        assert not any(secret in str(call.headers) for secret in ("k-openai", "k-custom", "o-1", "p-1"))


def test_a_key_is_not_repeated_in_messages(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESAFE_API_KEY", "k-secret")
    told: list[str] = []
    backend = EndpointBackend("m", serve(lambda call: refused(500, "who is k-secret?")).url, retries=0, log=told.append)
    answers(backend, [ask("a")])
    assert len(told) == 1 and "who is ***?" in told[0]
    assert "k-secret" not in backend.name


@pytest.mark.parametrize(
    ("url", "line"),
    [("ftp://x/v1", "http:// or https://"), ("x/v1", "http:// or https://"), ("http://u:p@x/v1", "no password"), ("http://x/v1?key=1", "no query"),
     ("http://api.openai.com/v1", "https only"), ("https://api.openai.com/v1", "set OPENAI_API_KEY")],
)  # fmt: skip
def test_an_address_must_be_plain_and_safe(monkeypatch: pytest.MonkeyPatch, url: str, line: str) -> None:
    if line == "https only":
        monkeypatch.setenv("OPENAI_API_KEY", "k-openai")
    with pytest.raises(ResafeError, match=line):
        EndpointBackend("m", url)


@pytest.mark.parametrize("options", [{"workers": 0}, {"retries": -1}, {"timeout": 0}, {"requests_per_minute": 0}])
def test_impossible_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ResafeError, match="needs a worker"):
        EndpointBackend("m", "http://x/v1", **options)


def test_a_served_model_has_no_identity() -> None:
    backend = EndpointBackend("org/m", "https://host:8/v1/")
    assert (backend.identity, backend.template, backend.name) == (None, "", "chat:org/m@host:8/v1")
    assert backend.rendered(ask("a")) == [{"role": "user", "content": "a"}]


def test_a_message_of_many_lines_becomes_one() -> None:
    said = explained(refusal(403, {"detail": "first\nsecond"}), "m", "http://x/v1")
    assert str(said) == "x/v1 refuses to answer as m (HTTP 403: first)."
