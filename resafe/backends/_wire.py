"""Requests, replies and faults as OpenAI-compatible servers spell them, and a client that sends a key only where it belongs.

https://platform.openai.com/docs/api-reference/chat
The key in OPENAI_API_KEY goes to https://api.openai.com and nowhere else; every other host gets the one in RESAFE_API_KEY, or none.
Redirects are not followed: they would carry prompts to a host that nobody named.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from resafe.backends._base import Request
from resafe.errors import ResafeError
from resafe.files import digest
from resafe.generate import Answer

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_KEY, OTHER_KEY = "OPENAI_API_KEY", "RESAFE_API_KEY"
NEW_LIMIT, OLD_LIMIT = "max_completion_tokens", "max_tokens"


@dataclass(eq=False)
class Fault(Exception):
    """Why there is no reply. `status` is 0 where none came; `after` is how many seconds the server asked to be left alone."""

    reason: str
    message: str
    status: int = 0
    code: str = ""
    after: float | None = None
    unreachable: bool = False

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed later."""
        return self.code != "insufficient_quota" and (self.status in (0, 408, 409, 429) or self.status >= 500)

    @property
    def fatal(self) -> bool:
        """Whether no request will succeed: the key, the model or the address is wrong, or the account is empty."""
        wrong = self.status in (401, 403, 404) or 300 <= self.status < 400
        return self.code == "insufficient_quota" or (wrong and self.reason != "content_filter")


def host_of(base_url: str) -> str:
    """Host, port and path, for names and messages. Raises ResafeError for what is no plain http(s) address."""
    url = urlsplit(base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ResafeError(f"an endpoint's address must start with http:// or https://, not '{base_url}'.")
    if url.username or url.password or url.query:
        raise ResafeError(f"the address of {url.hostname} must hold no password and no query: set {OTHER_KEY}.")
    return f"{url.hostname}{f':{url.port}' if url.port else ''}{url.path.rstrip('/')}"


def is_openai(base_url: str) -> bool:
    """Whether this is the one host that OPENAI_API_KEY is for."""
    return urlsplit(base_url).hostname == "api.openai.com"


def key_name(base_url: str) -> str:
    """The environment variable with the key for an address."""
    return OPENAI_KEY if is_openai(base_url) else OTHER_KEY


def client(base_url: str, timeout: float, retries: int = 0) -> Any:
    """An `openai.OpenAI` for one address; what the environment says about OpenAI accounts stays out of requests to other hosts."""
    from openai import DefaultHttpxClient, OpenAI, Timeout

    host_of(base_url)
    key = os.environ.get(key_name(base_url))
    if is_openai(base_url):
        if not key:
            raise ResafeError(f"api.openai.com needs a key: set {OPENAI_KEY}.")
        if urlsplit(base_url).scheme != "https":
            raise ResafeError("api.openai.com is spoken to over https only: the key would be readable on its way.")
    wait = Timeout(timeout, connect=min(timeout, 10.0))
    found = OpenAI(
        base_url=base_url, api_key=key or "none", timeout=wait, max_retries=retries,
        default_headers={"Authorization": f"Bearer {key or 'none'}"},  # over what OPENAI_CUSTOM_HEADERS may say
        http_client=DefaultHttpxClient(follow_redirects=False, timeout=wait),
    )  # fmt: skip
    if not is_openai(base_url):
        found.organization = found.project = None
    return found


def prefilled(request: Request) -> bool:
    """Whether the answer has to continue an assistant turn."""
    return request.messages[-1]["role"] == "assistant"


def request_seed(request: Request) -> int:
    """The seed of a request's draws, 31 bits: it depends on the run's seed and on the conversation, on nothing else."""
    return int(digest([request.sampling.seed, messages(request)])[:8], 16) & 0x7FFFFFFF


def body(model: str, request: Request, limit: str) -> dict[str, Any]:
    """The JSON of a chat completion. `limit` names the field for the number of tokens, which differs between servers."""
    s = request.sampling
    found = {"model": model, "messages": messages(request), limit: request.max_new_tokens, "temperature": s.temperature}
    return found if s.temperature == 0 else {**found, "top_p": s.top_p, "seed": request_seed(request)}


def messages(request: Request) -> list[dict[str, str]]:
    """Role and content of every turn, without whatever else a data set keeps beside them."""
    return [{"role": m["role"], "content": m["content"]} for m in request.messages]


def answer(reply: Any) -> Answer:
    """What a chat completion says. Whatever is no answer of the model becomes `error`; reasoning is not part of an answer."""
    try:
        choice = reply["choices"][0]
        message, end = choice["message"], choice.get("finish_reason")
        content = message.get("content")
        text = _text(content) or _text(message.get("refusal"))  # a refusal in its own field is what the model says
        count = (reply.get("usage") or {}).get("completion_tokens")
        reasoned = message.get("reasoning_content") or message.get("reasoning")
    except (AttributeError, IndexError, KeyError, TypeError):
        return Answer(error="parse")
    if end not in ("stop", "length"):
        return Answer(error="content_filter" if end == "content_filter" else "api_error")
    tokens = count if isinstance(count, int) else 0
    if not text and (content is None or reasoned or not tokens):  # else the model ended its turn at once: an answer
        return Answer(error="truncated" if end == "length" else "empty")
    return Answer(text, tokens, end == "stop")


def _text(content: Any) -> str:
    """The text of a message: a string, or the text parts (not the thinking parts) of a list."""
    if isinstance(content, list):
        return "".join(p.get("text") or p.get("refusal") or "" for p in content if p.get("type") in TEXT_PARTS).strip()
    if content is not None and not isinstance(content, str):
        raise TypeError("content is neither text nor parts")
    return (content or "").encode("utf-8", "replace").decode("utf-8").strip()  # half a surrogate pair is valid JSON, not text


TEXT_PARTS = ("text", "output_text", "refusal")


def fault(error: Exception) -> Fault:
    """What an `openai.APIError` means."""
    from openai import APIStatusError, APITimeoutError

    if isinstance(error, APITimeoutError):
        return Fault("timeout", "no reply in time")
    if isinstance(error, APIStatusError):
        return refusal(error.status_code, error.body, _after(error.response.headers))
    cause = error.__cause__
    unreachable = type(cause).__name__ == "ConnectError"  # httpx's or httpx2's, whichever the client was built on
    return Fault("api_error", _line(cause or error), unreachable=unreachable)


def refusal(status: int, said: Any, after: float | None = None) -> Fault:
    """What an HTTP error and its body mean. `said` is JSON: `{"error": {...}}`, the inner object, `{"detail": ...}`, or text."""
    inner = said.get("error", said) if isinstance(said, Mapping) else said
    inner = inner if isinstance(inner, Mapping) else {"message": inner or ""}
    message = _line(inner.get("message") or inner.get("detail") or f"HTTP {status}")
    code = str(inner.get("code") or inner.get("type") or "")
    return Fault(_reason(status, code, message.lower()), message, status, code, after)


def _reason(status: int, code: str, message: str) -> str:
    if code in ("content_filter", "content_policy_violation") or (status == 403 and "flagged" in message):
        return "content_filter"
    if code == "context_length_exceeded" or "maximum context length" in message:
        return "too_long"
    return "timeout" if status in (408, 504) else "api_error"


def wants_new_limit(found: Fault) -> bool:
    """Whether a server turned the old field for the number of tokens down and named the new one."""
    return found.status == 400 and NEW_LIMIT in found.message


def explained(found: Fault, model: str, base_url: str) -> ResafeError:
    """A fault that ends everything, as one line with the way out."""
    host, key = host_of(base_url), key_name(base_url)
    if found.unreachable:
        return ResafeError(f"{host} cannot be reached ({found.message}): start the server, or correct the address.")
    if found.status == 401:  # the server's own words may repeat a part of the key
        return ResafeError(f"{host} does not accept the key (HTTP 401): set {key} to a valid one.")
    if found.status == 404:
        return ResafeError(
            f"{host} knows no model '{model}' or is not an address of an API (HTTP 404: {found.message}): "
            "correct the model's name or the address, which usually ends in /v1."
        )
    if 300 <= found.status < 400:
        return ResafeError(
            f"{host} redirects elsewhere (HTTP {found.status}), which is not followed: give that address."
        )
    return ResafeError(f"{host} refuses to answer as {model} (HTTP {found.status}: {found.message}).")


def _after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by Retry-After (seconds or a date) or retry-after-ms."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers.get(name, "")) / unit)
        except ValueError:
            continue
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _line(message: Any) -> str:
    """The first line of a message, shortened, without either key."""
    text = (str(message).strip().splitlines() or ["no message"])[0][:300]
    for key in filter(None, (os.environ.get(OPENAI_KEY), os.environ.get(OTHER_KEY))):
        text = text.replace(key, "***")
    return text
