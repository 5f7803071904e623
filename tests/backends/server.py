"""A local HTTP server that replies as a test tells it to, and remembers what it was asked."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Call:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def prompt(self) -> str:
        """The last message's text."""
        return str(self.json["messages"][-1]["content"])


@dataclass(frozen=True)
class Reply:
    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    script: Callable[[Call], Reply]

    def __init__(self, script: Callable[[Call], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.calls, self.lock = script, list[Call](), threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        call = Call(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
        with self.server.lock:
            self.server.calls.append(call)
        reply = self.server.script(call)
        raw = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        with contextlib.suppress(OSError):  # the client may have left
            self.send_response(reply.status)
            for name, value in {
                "content-type": "application/json",
                "content-length": str(len(raw)),
                **reply.headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

    do_GET = do_POST = _any

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(script: Callable[[Call], Reply]) -> Iterator[Server]:
    server = Server(script)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def chat(text: Any, end: Any = "stop", tokens: Any = 3, prompt: Any = 5, **message: Any) -> dict[str, Any]:
    """A chat completion."""
    return {
        "choices": [{"index": 0, "finish_reason": end, "message": {"role": "assistant", "content": text, **message}}],
        "usage": {"completion_tokens": tokens, "prompt_tokens": prompt},
    }


def refused(status: int, message: str = "no", **error: Any) -> Reply:
    """An error as OpenAI words it; to be repeated without delay."""
    return Reply({"error": {"message": message, **error}}, status, {"retry-after-ms": "1"})
