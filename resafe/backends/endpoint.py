"""A model behind an OpenAI-compatible endpoint: api.openai.com, vLLM, SGLang, transformers serve, llama.cpp and the like.

https://platform.openai.com/docs/api-reference/chat

What a server decides and a request cannot: its chat template, dtype, top_k and repetition penalty (from the model's
generation_config.json, as a rule). `transformers serve` samples only if that file says `do_sample: true`; else every temperature
is greedy there. Servers count the end-of-turn token in `tokens`, a local model does not.

Requests that end in an assistant turn are continued with `continue_final_message` (vLLM, SGLang). `transformers serve` and
api.openai.com refuse that field; others ignore it and answer from scratch, which must not pass for a continuation. So the
first such request is preceded by a test: one token is asked for with and without the field, and only a prompt that is shorter
with it (no end of turn, no new header) shows that the server left the turn open. Where it did not, or does not report
the length of prompts, these requests get `Answer(error="prefill_unsupported")` and are not sent.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from resafe.backends import _wire
from resafe.backends._base import Request
from resafe.backends._pool import Pace, as_finished
from resafe.backends._wire import Fault
from resafe.errors import ResafeError
from resafe.generate import Answer

CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
_OPEN_TURN = [{"role": "user", "content": "Count to five."}, {"role": "assistant", "content": "One, two,"}]
PROBE = Request(_OPEN_TURN, max_new_tokens=1)
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between tries, doubled each time
TIMEOUT_RETRIES = 2  # at most: what is slow three times stays slow, and each try costs the whole time limit
LONGEST_PAUSE = 600.0  # seconds; a server that asks for more has failed


class EndpointBackend:
    """Chat completions, `workers` at a time, asked for again (`retries` times) after timeouts, lost connections, 429 and 5xx.

    `timeout` is in seconds for one reply; `requests_per_minute` counts every try; `log` hears of the first failure of each kind.
    Raises ResafeError when no request can succeed: wrong key, model or address, no server, every request refused alike.
    """

    template = ""
    identity: str | None = None  # nobody can tell from outside which weights are served, nor whether they were changed

    def __init__(
        self,
        model: str,
        base_url: str = _wire.OPENAI_URL,
        *,
        workers: int = 8,
        requests_per_minute: float | None = None,
        timeout: float = 300.0,
        retries: int = 6,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        if workers < 1 or retries < 0 or timeout <= 0 or (requests_per_minute is not None and requests_per_minute <= 0):
            raise ResafeError(
                "an endpoint needs a worker, a time limit and a rate above zero, and no negative retries."
            )
        self.model, self.base_url, self.workers, self.retries = model, base_url, workers, retries
        self.name = f"chat:{model}@{_wire.host_of(base_url)}"
        self._client, self._pace, self._log = _wire.client(base_url, timeout), Pace(requests_per_minute), log
        self._limit = _wire.NEW_LIMIT if _wire.is_openai(base_url) else _wire.OLD_LIMIT
        self._lock, self._answered, self._failures = threading.Lock(), False, set[str]()
        self._continues: bool | None = None

    def rendered(self, request: Request) -> Sequence[Any]:
        """The messages; the server renders them by its own template."""
        return _wire.messages(request)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Answers as they arrive."""
        open_ended = {i for i, r in enumerate(requests) if _wire.prefilled(r)}
        if open_ended and not self._can_continue():
            yield from ((i, Answer(error="prefill_unsupported")) for i in sorted(open_ended))
            jobs = [i for i in range(len(requests)) if i not in open_ended]
        else:
            jobs = list(range(len(requests)))
        yield from as_finished(jobs, lambda i, stop: self._ask(requests[i], stop), self.workers)

    def _ask(self, request: Request, stop: threading.Event) -> Answer:
        try:
            found = _wire.answer(self._reply(request, CONTINUE if _wire.prefilled(request) else {}, stop))
        except Fault as fault:
            return self._failed(fault)
        self._answered = True
        return found

    def _reply(self, request: Request, extra: Mapping[str, Any], stop: threading.Event) -> Any:
        """The JSON that a server replied with, after as many tries as it takes. Raises Fault."""
        tries = 0
        while True:
            stop.wait(self._pace.take())
            if stop.is_set():
                raise Fault("interrupted", "nobody waits for this answer")
            limit = self._limit
            try:
                return self._post(request, limit, extra)
            except Fault as fault:
                if _wire.wants_new_limit(fault) and limit == _wire.OLD_LIMIT:
                    self._limit = _wire.NEW_LIMIT
                    continue
                if tries == self.retries or not self._worth_waiting(fault, tries, stop):
                    raise
            tries += 1

    def _worth_waiting(self, fault: Fault, tries: int, stop: threading.Event) -> bool:
        """Wait before the next try; False if there is no point in one."""
        if not fault.passing or (fault.unreachable and not self._answered) or (fault.after or 0) > LONGEST_PAUSE:
            return False
        if fault.reason == "timeout" and tries >= TIMEOUT_RETRIES:
            return False
        wait = fault.after
        if wait is None:
            wait = min(FIRST_WAIT * 2.0**tries, LONGEST_WAIT) * random.uniform(0.75, 1.0)
        if fault.status == 429:
            self._pace.pause(wait)  # the others need not find out by themselves
        stop.wait(wait)
        return True

    def _post(self, request: Request, limit: str, extra: Mapping[str, Any]) -> Any:
        from openai import APIError

        sent = _wire.body(self.model, request, limit)
        try:
            raw = self._client.chat.completions.with_raw_response.create(**sent, extra_body=dict(extra) or None)
            return json.loads(raw.http_response.content)
        except APIError as error:
            raise _wire.fault(error) from None
        except ValueError:
            raise Fault("parse", "the reply is not JSON", 200) from None

    def _failed(self, fault: Fault) -> Answer:
        """The answer that is missing, or the end of the stream if nothing else is to be expected."""
        with self._lock:
            line = f"{fault.status} {fault.message}"
            alike = fault.status in (400, 422) and fault.reason == "api_error" and line in self._failures
            if fault.fatal or (not self._answered and (fault.unreachable or alike)):
                raise _wire.explained(fault, self.model, self.base_url)
            if fault.reason not in self._failures and fault.reason != "interrupted":
                self._log(f"{self.name}: no answer ({fault.reason}: {fault.message})")
            self._failures |= {fault.reason, line}
        return Answer(error=fault.reason)

    def _can_continue(self) -> bool:
        """Whether the server continues an open turn; remembered once it is certain."""
        if self._continues is None:
            open_turn = self._prompt_tokens(CONTINUE)
            closed_turn = self._prompt_tokens({}) if open_turn > 0 else 0
            if open_turn >= 0 and not closed_turn:
                return False  # nothing was learnt
            # A template may refuse to go on after a closed assistant turn; then the field was understood.
            self._continues = open_turn > 0 and (closed_turn > open_turn or closed_turn < 0)
        return self._continues

    def _prompt_tokens(self, extra: Mapping[str, Any]) -> int:
        """Length of the rendered test prompt; -1 if it is refused, 0 if the server does not tell."""
        try:
            reply = self._reply(PROBE, extra, threading.Event())
            count = (reply.get("usage") or {}).get("prompt_tokens")
        except AttributeError:
            return 0
        except Fault as fault:
            if fault.fatal or fault.unreachable:
                raise _wire.explained(fault, self.model, self.base_url) from None
            return -1 if fault.status in (400, 422) else 0
        return count if isinstance(count, int) else 0
