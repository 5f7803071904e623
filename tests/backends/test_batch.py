import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from resafe.backends import Request, Sampling
from resafe.backends import batch as module
from resafe.backends.batch import BatchBackend, parts
from resafe.errors import ResafeError
from resafe.generate import Answer
from tests.backends.server import Call, Reply, chat, refused, serving

Row = Callable[[dict[str, Any]], dict[str, Any]]


class Service:
    """A Batch API in memory: `row` answers one request, `states` are what the looks at a batch find, the last one for ever."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.batches: list[dict[str, Any]] = []
        self.states = ["validating", "in_progress", "completed"]
        self.row: Row = lambda body: {
            "response": {"status_code": 200, "body": chat(body["messages"][-1]["content"].upper())}
        }
        self.lose_reply = False
        self.looks = 0

    def __call__(self, call: Call) -> Reply:
        kind, *rest = call.path.removeprefix("/v1/").partition("?")[0].split("/")
        if kind == "files":
            return self._upload(call) if call.method == "POST" else Reply(self.files[rest[0]])
        if call.method == "POST":
            self.batches.insert(0, self._batch(call.json))
            return refused(500) if self.lose_reply else Reply(self.batches[0])
        return (
            Reply(self._look(rest[0])) if rest else Reply({"object": "list", "data": self.batches, "has_more": False})
        )

    def _upload(self, call: Call) -> Reply:
        assert b'name="purpose"\r\n\r\nbatch\r\n' in call.body
        start = call.body.index(b'{"custom_id"')
        self.files[name := f"file-{len(self.files)}"] = call.body[start : call.body.rindex(b"}\n") + 2]
        return Reply({"id": name, "object": "file"})

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert (asked["endpoint"], asked["completion_window"]) == ("/v1/chat/completions", "24h")
        return {"id": f"batch-{len(self.batches)}", "object": "batch", "status": "validating", **asked}

    def _look(self, name: str) -> dict[str, Any]:
        batch = next(b for b in self.batches if b["id"] == name)
        batch["status"] = self.states[min(self.looks, len(self.states) - 1)]
        self.looks += 1
        batch["request_counts"] = {"total": 2, "completed": self.looks - 1, "failed": 0}
        if batch["status"] in ("completed", "expired", "cancelled"):
            self._end(batch)
        return batch

    def _end(self, batch: dict[str, Any]) -> None:
        done: dict[str, list[dict[str, Any]]] = {"output": [], "error": []}
        for line in self.files[batch["input_file_id"]].splitlines():
            sent = json.loads(line)
            if found := self.row(sent["body"]):
                kind = "output" if (found.get("response") or {}).get("status_code") == 200 else "error"
                done[kind].insert(
                    0, {"id": "r", "custom_id": sent["custom_id"], "error": None, **found}
                )  # not in our order
        for kind, rows in done.items():
            if rows:
                batch[f"{kind}_file_id"] = f"{batch['id']}-{kind}"
                self.files[f"{batch['id']}-{kind}"] = b"".join(
                    json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in rows
                )


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("RESAFE_API_KEY", "k-secret")
    found = Service()
    with serving(found) as server:
        found.url = server.url  # type: ignore[attr-defined]
        yield found


def open_(service: Any, workdir: Path, **options: Any) -> BatchBackend:
    return BatchBackend("m", service.url, workdir, poll=0.001, **options)


def ask(*texts: str, **options: Any) -> list[Request]:
    return [Request([{"role": "user", "content": t}], **options) for t in texts]


def test_a_batch_is_sent_waited_for_and_matched_to_its_requests(service: Service, tmp_path: Path) -> None:
    told: list[str] = []
    found = dict(open_(service, tmp_path, log=told.append).stream(ask("a", "b\u2028c")))
    assert found == {0: Answer("A", 3, True), 1: Answer("B\u2028C", 3, True)}
    rows = [json.loads(line) for line in service.files["file-0"].split(b"\n") if line]
    assert [(r["method"], r["url"]) for r in rows] == [("POST", "/v1/chat/completions")] * 2
    assert rows[0]["body"] == {
        "model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 256, "temperature": 0.0,
    }  # fmt: skip
    assert [line.partition(": ")[2] for line in told] == [
        "batch-0 sent with 2 requests", "batch-0 validating, 0 of 2 done", "batch-0 in_progress, 1 of 2 done",
        "batch-0 completed; 2 answers, 0 without one",
    ]  # fmt: skip


def test_equal_requests_are_sent_once_and_answered_each(service: Service, tmp_path: Path) -> None:
    sampled = ask("a", sampling=Sampling(1.0))
    found = dict(open_(service, tmp_path).stream([*ask("a"), *sampled, *ask("a")]))
    assert found == dict.fromkeys(range(3), Answer("A", 3, True))
    assert len(service.files["file-0"].splitlines()) == 2


def test_a_killed_run_goes_on_with_the_batch_it_sent(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.time, "sleep", killed)
        with pytest.raises(KeyboardInterrupt):
            list(open_(service, tmp_path).stream(ask("a", "b")))
    (note,) = tmp_path.iterdir()
    assert "secret" not in note.read_text() and '"a"' not in note.read_text()
    found = dict(open_(service, tmp_path).stream(ask("b", "new", "a")))  # in another order, and with one that is new
    assert found == {0: Answer("B", 3, True), 1: Answer("NEW", 3, True), 2: Answer("A", 3, True)}
    assert [len(service.files[b["input_file_id"]].splitlines()) for b in reversed(service.batches)] == [2, 1]
    assert list(tmp_path.iterdir()) == []


def test_a_batch_whose_creation_was_not_confirmed_is_found_again(service: Service, tmp_path: Path) -> None:
    service.lose_reply = True
    with pytest.raises(ResafeError, match="run the same again"):
        list(open_(service, tmp_path).stream(ask("a")))
    service.lose_reply = False
    assert dict(open_(service, tmp_path).stream(ask("a"))) == {0: Answer("A", 3, True)}
    assert len(service.batches) == 1


def test_a_batch_that_was_never_created_is_sent_again(service: Service, tmp_path: Path) -> None:
    service.lose_reply = True
    with pytest.raises(ResafeError):
        list(open_(service, tmp_path).stream(ask("a")))
    service.lose_reply, service.batches = False, []
    assert dict(open_(service, tmp_path).stream(ask("a"))) == {0: Answer("A", 3, True)}


def test_answers_that_were_not_taken_are_fetched_again_and_not_paid_again(service: Service, tmp_path: Path) -> None:
    stream = open_(service, tmp_path).stream(ask("a", "b"))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(dict(open_(service, tmp_path).stream(ask("a", "b")))) == 2
    assert len(service.batches) == 1


def test_rows_fail_one_by_one_and_are_sent_anew_the_next_time(service: Service, tmp_path: Path) -> None:
    rows: dict[str, dict[str, Any]] = {
        "ok": {"response": {"status_code": 200, "body": chat("fine")}},
        "cut": {"response": {"status_code": 200, "body": chat("c", "length")}},
        "filtered": {"response": {"status_code": 400, "body": {"error": {"message": "no", "code": "content_filter"}}}},
        "broken": {"response": {"status_code": 500, "body": {"error": {"message": "boom"}}}},
        "odd": {"response": {"status_code": 200, "body": None}},
        "late": {"response": None, "error": {"code": "batch_expired", "message": "too late"}},
        "lost": {},
    }
    service.row = lambda body: rows[body["messages"][-1]["content"]]
    told: list[str] = []
    found = dict(open_(service, tmp_path, log=told.append).stream(ask(*rows)))
    assert [found[i].error for i in range(7)] == [
        "",
        "",
        "content_filter",
        "api_error",
        "parse",
        "expired",
        "api_error",
    ]
    assert (found[0].finished, found[1].finished) == (True, False)
    assert sum("no answer (api_error: boom)" in line for line in told) == 1
    dict(open_(service, tmp_path).stream(ask("broken")))
    assert len(service.batches) == 2


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_a_batch_that_ended_early_keeps_what_was_done(service: Service, tmp_path: Path, status: str) -> None:
    service.states = [status]
    whole = service.row
    service.row = lambda body: whole(body) if body["messages"][-1]["content"] == "a" else {}
    assert dict(open_(service, tmp_path).stream(ask("a", "b"))) == {0: Answer("A", 3, True), 1: Answer(error=status)}


def test_a_batch_refused_as_a_whole_says_why_and_may_be_sent_again(service: Service, tmp_path: Path) -> None:
    service.states = ["failed"]
    service._batch = lambda asked: {  # type: ignore[method-assign]
        "id": f"batch-{len(service.batches)}", "object": "batch", "errors": {"data": [{"message": "no model m"}]}, **asked,
    }  # fmt: skip
    for n in (1, 2):
        with pytest.raises(ResafeError, match="refused the batch batch-.: no model m"):
            list(open_(service, tmp_path).stream(ask("a")))
        assert len(service.batches) == n


def test_a_prefilled_request_is_not_sent(service: Service, tmp_path: Path) -> None:
    request = Request([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert list(open_(service, tmp_path).stream([request])) == [(0, Answer(error="prefill_unsupported"))]
    assert service.files == {}


def test_a_wrong_key_and_a_missing_api_are_one_line(tmp_path: Path) -> None:
    for status, line in ((401, "set RESAFE_API_KEY"), (404, "has no Batch API")):
        with serving(lambda call, s=status: refused(s)) as server, pytest.raises(ResafeError, match=line):  # type: ignore[misc]
            list(BatchBackend("m", server.url, tmp_path).stream(ask("a")))


def test_a_damaged_note_is_said(service: Service, tmp_path: Path) -> None:
    (tmp_path / "batch-x.json").write_text("{")
    with pytest.raises(ResafeError, match="batch-x.json is damaged: remove it"):
        list(open_(service, tmp_path).stream(ask("a")))


def test_large_sets_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(str(i), {"text": "x" * 50}) for i in range(7)]
    size = len(next(parts(rows[:1]))[0][1])
    monkeypatch.setattr(module, "MAX_ROWS", 3)
    assert [[name for name, _ in p] for p in parts(rows)] == [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    monkeypatch.setattr(module, "MAX_BYTES", 2 * size)
    assert [len(p) for p in parts(rows)] == [2, 2, 2, 1]
    assert list(parts([])) == []


def test_a_batch_has_no_identity(service: Any, tmp_path: Path) -> None:
    backend = open_(service, tmp_path)
    assert (backend.identity, backend.template) == (None, "")
    assert backend.rendered(ask("a")[0]) == [{"role": "user", "content": "a"}]
