"""The Batch API: half the price, up to a day of waiting. https://platform.openai.com/docs/guides/batch

A batch that was paid for is not paid for twice: which requests are in which batch is kept in `workdir`, one small file for each
batch (hashes and ids, no prompts), so that the same call after an interruption waits for what was sent before. The file is
written before the batch is created and names it by a mark in the batch's metadata; if the process or the network
dies in between, the batch is found again by that mark. It is removed when all its answers have been taken.

Prefilled requests are not sent (`prefill_unsupported`): the API cannot continue a turn. Equal requests are sent once.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from resafe.backends import _wire
from resafe.backends._base import Request
from resafe.errors import ResafeError
from resafe.files import digest, write_json
from resafe.generate import Answer

ENDED = ("completed", "failed", "expired", "cancelled")
MAX_ROWS, MAX_BYTES = 50_000, 190_000_000  # of one batch; the API's limits are 50,000 and 200 MB
MARK = "resafe"
RECENT = 1000  # batches, newest first, among which one is looked for
CODES = {"batch_expired": "expired", "batch_cancelled": "cancelled"}


class BatchBackend:
    """Answers through batches; `poll` is the number of seconds between looks, `log` hears of every change.

    Raises ResafeError when a batch is refused as a whole, or when the service cannot be asked; waiting goes on at the next call.
    """

    template = ""
    identity: str | None = None

    def __init__(
        self,
        model: str,
        base_url: str = _wire.OPENAI_URL,
        workdir: str | Path = "batches",
        *,
        poll: float = 30.0,
        timeout: float = 120.0,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model, self.base_url, self.workdir, self.poll = model, base_url, Path(workdir), poll
        self.host = _wire.host_of(base_url)
        self.name = f"batch:{model}@{self.host}"
        self._client, self._log = _wire.client(base_url, timeout, retries=5), log
        self._once = _wire.client(base_url, timeout)  # creating a batch twice would be paying twice
        self._limit = _wire.NEW_LIMIT if _wire.is_openai(base_url) else _wire.OLD_LIMIT

    def rendered(self, request: Request) -> Sequence[Any]:
        """The messages; the server renders them by its own template."""
        return _wire.messages(request)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Answers, batch by batch."""
        where: dict[str, list[int]] = {}
        bodies: dict[str, dict[str, Any]] = {}
        for i, request in enumerate(requests):
            if _wire.prefilled(request):
                yield i, Answer(error="prefill_unsupported")
                continue
            body = _wire.body(self.model, request, self._limit)
            name = digest([self.host, body])[:40]
            bodies[name] = body
            where.setdefault(name, []).append(i)
        for note in self._sent(bodies):
            answers = self._answers(note)
            yield from ((i, answers[name]) for name in note["rows"] for i in where.pop(name, ()))
            self._note(note["mark"]).unlink(missing_ok=True)

    def _sent(self, bodies: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Notes of the batches that hold these requests; whatever no earlier batch holds is sent now."""
        notes = [n for n in self._kept() if not bodies.keys().isdisjoint(n["rows"])]
        notes = [n for n in notes if n["batch"] or self._found_again(n)]
        for note in notes:
            self._log(f"{self.name}: going on with {note['batch']}")
        known = {name for n in notes for name in n["rows"]}
        for part in parts([(name, body) for name, body in bodies.items() if name not in known]):
            notes.append(self._send(part))
        return notes

    def _send(self, rows: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
        note: dict[str, Any] = {"mark": uuid.uuid4().hex, "batch": None, "rows": [name for name, _ in rows]}
        lines = b"".join(line for _, line in rows)
        with self._asking():
            file = self._client.files.create(file=("requests.jsonl", lines), purpose="batch")
            write_json(self._note(note["mark"]), note)
            batch = self._once.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h",
                metadata={MARK: note["mark"]},
            )  # fmt: skip
        note["batch"] = batch.id
        write_json(self._note(note["mark"]), note)
        self._log(f"{self.name}: {batch.id} sent with {len(rows)} requests")
        return note

    def _found_again(self, note: dict[str, Any]) -> bool:
        """Look for a batch that was created without our having heard of it. A note of one that was not is removed."""
        with self._asking():
            for batch in islice(self._client.batches.list(limit=100), RECENT):
                if (batch.metadata or {}).get(MARK) == note["mark"]:
                    note["batch"] = batch.id
                    write_json(self._note(note["mark"]), note)
                    return True
        self._note(note["mark"]).unlink()
        return False

    def _answers(self, note: dict[str, Any]) -> dict[str, Answer]:
        """One answer for each row of a batch, when it has ended."""
        batch = self._ended(note["batch"])
        if batch.status == "failed":
            self._note(note["mark"]).unlink()  # the next call may send it again
            said = batch.errors.data[0].message if batch.errors and batch.errors.data else "no reason given"
            raise ResafeError(f"{self.host} refused the batch {batch.id}: {said}")
        missing = Answer(error="api_error" if batch.status == "completed" else batch.status)
        found = dict.fromkeys(note["rows"], missing)
        for file in filter(None, (batch.output_file_id, batch.error_file_id)):
            with self._asking():
                lines = self._client.files.content(file).content.split(b"\n")
            for name, answer, why in read(lines):
                if why and answer.error not in {a.error for a in found.values() if a is not missing}:
                    self._log(f"{self.name}: no answer ({answer.error}: {why})")
                if name in found:
                    found[name] = answer
        failed = sum(bool(a.error) for a in found.values())
        self._log(f"{self.name}: {batch.id} {batch.status}; {len(found) - failed} answers, {failed} without one")
        return found

    def _ended(self, batch_id: str) -> Any:
        said = ""
        while True:
            with self._asking():
                batch = self._client.batches.retrieve(batch_id)
            if batch.status in ENDED:
                return batch
            counts = batch.request_counts
            line = f"{batch.status}{f', {counts.completed + counts.failed} of {counts.total} done' if counts else ''}"
            if line != said:
                self._log(f"{self.name}: {batch_id} {line}")
            said = line
            time.sleep(self.poll)

    def _kept(self) -> list[dict[str, Any]]:
        found = []
        for file in sorted(self.workdir.glob("batch-*.json")):
            try:
                note = json.loads(file.read_text(encoding="utf-8"))
                found.append({"mark": note["mark"], "batch": note["batch"], "rows": list(note["rows"])})
            except (ValueError, KeyError, TypeError):
                raise ResafeError(f"{file} is damaged: remove it; its batch will be sent again.") from None
        return found

    def _note(self, mark: str) -> Path:
        return self.workdir / f"batch-{mark}.json"

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Faults of the service, after the client's own retries, as one line."""
        from openai import APIError

        try:
            yield
        except APIError as error:
            fault = _wire.fault(error)
            if fault.status == 404:
                raise ResafeError(
                    f"{self.host} has no Batch API, or does not know a batch that {self.workdir} names "
                    f"(HTTP 404: {fault.message}): correct the address, or remove the note there to send it again."
                ) from None
            if fault.fatal or fault.unreachable:
                raise _wire.explained(fault, self.model, self.base_url) from None
            raise ResafeError(
                f"{self.host} failed ({fault.reason}: {fault.message}): run the same again; batches that were sent are kept in {self.workdir}."
            ) from None


def parts(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[list[tuple[str, bytes]]]:
    """(custom id, line of JSON) of requests, in portions that one batch may hold."""
    part: list[tuple[str, bytes]] = []
    size = 0
    for name, body in rows:
        row = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        if part and (len(part) == MAX_ROWS or size + len(line) > MAX_BYTES):
            yield part
            part, size = [], 0
        part.append((name, line))
        size += len(line)
    if part:
        yield part


def read(lines: Iterable[bytes]) -> Iterator[tuple[str, Answer, str]]:
    """(custom id, answer, why there is none) of the rows of an output or error file. A row without a name is left out."""
    for line in lines:
        try:
            row = json.loads(line)
            name, response, error = row["custom_id"], row.get("response") or {}, row.get("error") or {}
            answer, why = _row(response, error)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        yield name, answer, why


def _row(response: dict[str, Any], error: dict[str, Any]) -> tuple[Answer, str]:
    if response.get("status_code") == 200:
        return _wire.answer(response.get("body")), ""
    if response:
        fault = _wire.refusal(int(response["status_code"]), response.get("body"))
        return Answer(error=fault.reason), fault.message
    return Answer(error=CODES.get(str(error.get("code")), "api_error")), str(error.get("message"))
