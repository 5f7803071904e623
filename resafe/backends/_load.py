"""From a spec, as users write it in commands, to a back-end."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from resafe.backends._base import Backend
from resafe.errors import ResafeError, suggest

KINDS = ("openai", "chat", "batch", "vllm")
_SERVED = re.compile(r"(?P<model>.+)@(?P<url>https?://\S+)")


def open_backend(
    spec: str | Path, *, workdir: Path | None = None, log: Callable[[str], None] = lambda _: None,
    workers: int = 8, requests_per_minute: float | None = None,
) -> Backend:  # fmt: skip
    """A back-end by its spec; a folder that exists is taken as it is, and `lab` is the embedded model.

    `workers` and `requests_per_minute` bound what an endpoint is asked at a time.

    openai:MODEL | chat:MODEL@URL | batch:MODEL@URL | vllm:FOLDER | FOLDER | lab. `batch:` keeps its notes in `workdir`.
    Raises ResafeError for anything else.
    """
    from resafe.lab import resolve

    kind, mark, rest = str(spec).partition(":")
    if Path(spec).is_dir() or str(spec) in ("lab", "lab:base", "lab:aligned"):
        from resafe.backends.local import LocalBackend

        local: Backend = LocalBackend(resolve(str(spec)))
        return local
    if kind == "openai" and rest:
        from resafe.backends.endpoint import EndpointBackend

        return EndpointBackend(rest, log=log, workers=workers, requests_per_minute=requests_per_minute)
    if kind == "chat" and mark:
        from resafe.backends.endpoint import EndpointBackend

        return EndpointBackend(*_parts(kind, rest), log=log, workers=workers, requests_per_minute=requests_per_minute)
    if kind == "batch" and mark:
        return _batch(rest, workdir, log)
    if kind == "vllm" and rest:
        from resafe.backends.vllm import VllmBackend

        return VllmBackend(resolve(rest))
    if mark and "/" not in kind:
        raise ResafeError(f"no such model folder, and no such back-end: '{spec}'. {suggest(kind, KINDS)}")
    raise ResafeError(f"no such model folder: {spec}")


def check_spec(spec: str) -> None:
    """Raise ResafeError for a spec of a served model that cannot be one, before anything else is asked."""
    from resafe.backends._wire import host_of

    kind, _, rest = spec.partition(":")
    if kind in ("chat", "batch"):
        host_of(_parts(kind, rest)[1])


def _parts(kind: str, rest: str) -> tuple[str, str]:
    """MODEL and URL."""
    if not (found := _SERVED.fullmatch(rest)):
        raise ResafeError(f"'{kind}:{rest}' is not of the form {kind}:MODEL@URL.")
    return found["model"], found["url"]


def _batch(rest: str, workdir: Path | None, log: Callable[[str], None]) -> Backend:
    model, url = _parts("batch", rest)
    if workdir is None:
        raise ResafeError(f"'batch:{rest}' needs a folder in which it remembers what it has sent: name one with --store.")
    from resafe.backends.batch import BatchBackend

    return BatchBackend(model, url, workdir, log=log)
