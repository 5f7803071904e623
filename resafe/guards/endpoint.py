"""Judges behind OpenAI-compatible endpoints: the moderation API, and models served for chat or completion.

Any fault of the endpoint leaves the exchange unscored. Nothing is logged; keys are taken from the environment. Where the server
gives log-probabilities, P(harmful) is read from them; where it refuses to, the question is asked again without.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from resafe.errors import ResafeError
from resafe.guards._base import Exchange, Scale, Verdict, unscored, valid_score
from resafe.guards._logprobs import Seen, of_chat, of_completion, probabilities
from resafe.guards.families import Family, family

KEY = "OPENAI_API_KEY"
OPENAI_URL = "https://api.openai.com/v1"
GUARD_KEY = "RESAFE_GUARD_API_KEY"  # for other hosts, so that no key travels to a host that it is not for
TOP = {"chat": 20, "completion": 5}  # the most log-probabilities that OpenAI gives


@dataclass(frozen=True)
class Reply:
    """What a server answered: its text, why it ended, whether it declined, and the tokens with their alternatives."""

    text: Any
    end: Any
    refused: Any = None
    tokens: Sequence[Seen] = ()


class ModerationGuard:
    """The OpenAI moderation API. It judges texts, not exchanges: only the response is sent; no say on refusals."""

    scale: Scale | None = None

    def __init__(
        self, model: str = "omni-moderation-latest", base_url: str | None = None, *, timeout: float = 30, workers: int = 8
    ) -> None:
        key = os.environ.get(KEY if base_url is None else GUARD_KEY)
        if not key:
            raise ResafeError(f"the moderation guard needs a key: set {KEY if base_url is None else GUARD_KEY}.")
        self._client = _client(base_url or OPENAI_URL, key, timeout)
        self.workers, self.model, self.name = workers, model, f"moderation:{model}"
        self.identity = f"{self.name} at {_host(self._client)} parser v2 response only"

    def classify(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Verdicts with the highest category score."""
        return _each(self._ask, exchanges, self.workers)

    def _ask(self, exchange: Exchange) -> Verdict:
        reply = self._client.moderations.create(model=self.model, input=exchange[1])
        try:
            (result,) = reply.results  # one text was sent
            flagged, scores = result.flagged, result.category_scores.model_dump(by_alias=True)
            names = tuple(sorted(n for n, on in result.categories.model_dump(by_alias=True).items() if on is True))
        except (AttributeError, TypeError, ValueError):
            return unscored("parse")
        found = [s for s in scores.values() if s is not None]
        if not isinstance(flagged, bool) or not found:
            return unscored("parse")
        if not all(valid_score(s) for s in found):
            return unscored("out_of_range")
        return Verdict(flagged, float(max(found)), categories=names)


class ChatGuard:
    """A judge served by vLLM, SGLang, OpenAI and the like. The server applies the chat template, if the family asks for one."""

    def __init__(
        self, base_url: str, model: str, family_name: str | Family | None = None, *, timeout: float = 60, workers: int = 8
    ) -> None:
        self.family = family_name if isinstance(family_name, Family) else family(family_name, model)
        self._client = _client(base_url, os.environ.get(GUARD_KEY) or "none", timeout)
        self._logprobs = bool(self.family.choices)
        self.workers, self.model, self.name = workers, model, f"chat:{model}"
        self.identity = f"{self.name} at {_host(self._client)} {self.family.identity}"

    @property
    def scale(self) -> Scale | None:
        """The scale of the family's ratings."""
        return self.family.scale

    def classify(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Verdicts as the family's parser reads them; a score where the server gives log-probabilities."""
        return _each(self._ask, exchanges, self.workers)

    def _ask(self, exchange: Exchange) -> Verdict:
        reply = self._reply(exchange)
        if reply.refused or reply.end == "content_filter":
            return unscored("refusal")
        if reply.text is None or reply.text == "":
            return unscored("empty")
        by_token = self.family.max_tokens == 1  # one token is the whole answer, and the limit its proper end
        if reply.end != "stop" and not (by_token and reply.end == "length"):
            return unscored("truncated" if reply.end == "length" else "parse")
        return self._verdict(reply) if isinstance(reply.text, str) else unscored("parse")

    def _verdict(self, reply: Reply) -> Verdict:
        read = self.family.parse(reply.text)
        found = probabilities(self.family.choices, reply.tokens)
        if found is None or self.family.weigh is None:
            return read
        weighed = self.family.weigh(found, "")
        if weighed.rating is not None:
            return weighed
        # Where text and logits disagree, the text stands, and a score that contradicts it is worth nothing.
        agree = read.harmful is not None and read.harmful == weighed.harmful
        return replace(read, score=weighed.score) if agree else read

    def _reply(self, exchange: Exchange) -> Reply:
        from openai import BadRequestError, UnprocessableEntityError

        if not self._logprobs:
            return self._send(exchange, False)
        try:
            return self._send(exchange, True)
        except (BadRequestError, UnprocessableEntityError):
            reply = self._send(exchange, False)
            self._logprobs = False  # it was the log-probabilities that this server does not take
            return reply

    def _send(self, exchange: Exchange, logprobs: bool) -> Reply:
        raw = self.family.template is not None and not self.family.rubric
        return self._complete(exchange, logprobs) if raw else self._chat(exchange, logprobs)

    def _chat(self, exchange: Exchange, logprobs: bool) -> Reply:
        more = {"logprobs": True, "top_logprobs": TOP["chat"]} if logprobs else {}
        reply = self._client.chat.completions.create(
            model=self.model, messages=self.family.messages(exchange, self.identity), temperature=0,
            max_tokens=self.family.max_tokens, **more,
        )  # fmt: skip
        (choice,) = reply.choices
        refused = getattr(choice.message, "refusal", None)
        return Reply(choice.message.content, choice.finish_reason, refused, of_chat(getattr(choice, "logprobs", None)))

    def _complete(self, exchange: Exchange, logprobs: bool) -> Reply:
        prompt = self.family.text(exchange).removeprefix("<s>")  # servers add it
        more = {"logprobs": TOP["completion"]} if logprobs else {}
        reply = self._client.completions.create(
            model=self.model, prompt=prompt, temperature=0, max_tokens=self.family.max_tokens, **more
        )
        (choice,) = reply.choices
        return Reply(choice.text, choice.finish_reason, tokens=of_completion(getattr(choice, "logprobs", None)))


def _client(base_url: str, key: str, timeout: float) -> Any:
    """A client for one address, with the key for it and nothing else that the environment says of OpenAI accounts."""
    from openai import DefaultHttpxClient, OpenAI

    url = urlsplit(base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ResafeError(f"a guard's address must start with http:// or https://, not '{base_url}'.")
    if url.username or url.password or url.query:
        raise ResafeError(f"the address of {url.hostname} must hold no password and no query: set {GUARD_KEY}.")
    found = OpenAI(
        base_url=base_url, api_key=key, timeout=timeout, max_retries=2, default_headers={"Authorization": f"Bearer {key}"},
        http_client=DefaultHttpxClient(follow_redirects=False, timeout=timeout),  # a judged text goes to nobody else
    )  # fmt: skip
    if url.hostname != urlsplit(OPENAI_URL).hostname:
        found.organization = found.project = None
    return found


def _host(client: Any) -> str:
    address = urlsplit(str(client.base_url))
    return f"{address.hostname}{f':{address.port}' if address.port else ''}{address.path.rstrip('/')}"


def _each(ask: Callable[[Exchange], Verdict], exchanges: Sequence[Exchange], workers: int) -> list[Verdict]:
    def safely(exchange: Exchange) -> Verdict:
        from openai import APITimeoutError

        if not exchange[1].strip():
            return unscored("empty")
        try:
            return ask(exchange)
        except (APITimeoutError, TimeoutError):
            return unscored("timeout")
        except Exception:  # whatever goes wrong with a remote service is no verdict
            return unscored("api_error")

    with ThreadPoolExecutor(max_workers=workers) as pool:
        return list(pool.map(safely, exchanges))
