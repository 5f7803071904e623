"""Guards behind OpenAI-compatible endpoints: the moderation API, and guard models served as chat models.

Any fault of the endpoint leaves the exchange unscored. Nothing is logged; keys are taken from the environment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from resafe.errors import ResafeError
from resafe.guards._base import Exchange, Verdict, unscored, valid_score
from resafe.guards.families import family, neutralise

KEY = "OPENAI_API_KEY"
GUARD_KEY = "RESAFE_GUARD_API_KEY"  # for other hosts, so that no key travels to a host that it is not for


class ModerationGuard:
    """The OpenAI moderation API. It judges texts, not exchanges: only the response is sent; no say on refusals."""

    def __init__(
        self, model: str = "omni-moderation-latest", base_url: str | None = None, *, timeout: float = 30, workers: int = 8
    ) -> None:
        key = os.environ.get(KEY if base_url is None else GUARD_KEY)
        if not key:
            raise ResafeError(f"the moderation guard needs a key: set {KEY if base_url is None else GUARD_KEY}.")
        self._client = _client(base_url, key, timeout)
        self.workers, self.model, self.name = workers, model, f"moderation:{model}"
        self.identity = f"{self.name} at {_host(self._client)} parser v1 response only"

    def classify(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Verdicts with the highest category score."""
        return _each(self._ask, exchanges, self.workers)

    def _ask(self, exchange: Exchange) -> Verdict:
        reply = self._client.moderations.create(model=self.model, input=exchange[1])
        try:
            result = reply.results[0]
            flagged, scores = result.flagged, result.category_scores.model_dump(by_alias=True)
            names = tuple(sorted(n for n, on in result.categories.model_dump(by_alias=True).items() if on is True))
        except (AttributeError, TypeError, IndexError):
            return unscored("parse")
        found = [s for s in scores.values() if s is not None]
        if not isinstance(flagged, bool) or not found:
            return unscored("parse")
        if not all(valid_score(s) for s in found):
            return unscored("out_of_range")
        return Verdict(flagged, float(max(found)), categories=names)


class ChatGuard:
    """A guard model served by vLLM, SGLang and the like, whose chat template the server applies."""

    def __init__(
        self, base_url: str, model: str, family_name: str | None = None, *, timeout: float = 60, workers: int = 8
    ) -> None:
        self.family = family(family_name, model)
        self._client = _client(base_url, os.environ.get(GUARD_KEY) or "none", timeout)
        self.workers, self.model, self.name = workers, model, f"chat:{model}"
        self.identity = f"{self.name} at {_host(self._client)} {self.family.identity}"

    def classify(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Verdicts as the family's parser reads them."""
        return _each(self._ask, exchanges, self.workers)

    def _ask(self, exchange: Exchange) -> Verdict:
        turns = [*exchange[0], {"role": "assistant", "content": exchange[1]}]
        messages = [{"role": t["role"], "content": neutralise(t["content"])} for t in turns]
        text, end, refused = self._complete(messages) if self.family.template else self._chat(messages)
        if refused:
            return unscored("refusal")
        if end != "stop":
            return unscored("truncated" if end == "length" else "parse")
        return self.family.parse(text) if isinstance(text, str) else unscored("parse")

    def _chat(self, messages: list[dict[str, str]]) -> tuple[Any, Any, Any]:
        reply = self._client.chat.completions.create(
            model=self.model, messages=messages, temperature=0, max_tokens=self.family.max_tokens
        )
        choice = reply.choices[0]
        return choice.message.content, choice.finish_reason, getattr(choice.message, "refusal", None)

    def _complete(self, messages: list[dict[str, str]]) -> tuple[Any, Any, Any]:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = ImmutableSandboxedEnvironment().from_string(self.family.template or "")
        prompt = template.render(messages=messages).removeprefix("<s>")  # servers add it
        reply = self._client.completions.create(
            model=self.model, prompt=prompt, temperature=0, max_tokens=self.family.max_tokens
        )
        return reply.choices[0].text, reply.choices[0].finish_reason, None


def _client(base_url: str | None, key: str, timeout: float) -> Any:
    from openai import OpenAI

    if base_url is not None and urlsplit(base_url).scheme not in ("http", "https"):
        raise ResafeError(f"a guard's address must start with http:// or https://, not '{base_url}'.")
    return OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=2)


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
        except APITimeoutError:
            return unscored("timeout")
        except Exception:  # whatever goes wrong with a remote service is no verdict
            return unscored("api_error")

    with ThreadPoolExecutor(max_workers=workers) as pool:
        return list(pool.map(safely, exchanges))
