"""Start of a process under `resafe run`: a receipt, and a wrap of `transformers.Trainer.train` once that module is imported.

Standard library only and small, because every Python process below the user's command runs it. Nothing of transformers is
imported here; nothing inside the training loop is touched.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import json
import os
import socket
import sys
import time
from typing import Any

RECEIPTS = "RESAFE_RECEIPTS"  # the folder that receipts go to; unset means that no run is being watched
MODULE = "transformers.trainer"
EXIT_NOT_APPLIED = 3


def receipt(event: str, **facts: Any) -> None:
    """Append one line about this process to its own file in the receipts folder; on disk before this returns."""
    folder = os.environ.get(RECEIPTS)
    if not folder:
        return
    entry = {"event": event, "time": time.time(), "pid": os.getpid(), "ppid": os.getppid(), "host": socket.gethostname(), **facts}
    file = os.path.join(folder, f"{socket.gethostname()}-{os.getpid()}.jsonl")
    line = (json.dumps(entry) + "\n").encode()
    fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, line)
        os.fsync(fd)
    finally:
        os.close(fd)


def start() -> None:
    """Once per process: say that it is watched, and wait for `transformers.trainer`."""
    if not os.environ.get(RECEIPTS) or any(isinstance(f, _Finder) for f in sys.meta_path):
        return
    if MODULE in sys.modules:
        patch(sys.modules[MODULE])
    else:
        sys.meta_path.insert(0, _Finder())
    _told("bootstrap", executable=sys.executable, argv0=sys.argv[0] if getattr(sys, "argv", None) else "")


def _told(event: str, **facts: Any) -> None:
    """`receipt` where a folder that cannot be written to must not stop start-up: `applied` will fail on it, and loudly."""
    try:
        receipt(event, **facts)
    except OSError as error:
        sys.stderr.write(f"resafe: no receipt can be written to {os.environ.get(RECEIPTS)}: {error.strerror}\n")


def patch(module: Any) -> None:
    """Wrap `Trainer.train` and `Trainer.save_model` of the module `transformers.trainer`, once."""
    trainer = module.Trainer
    if hasattr(trainer.train, "__resafe__"):
        return
    trainer.train = _wrapped_train(trainer.train)
    trainer.save_model = _wrapped_save(trainer.save_model)
    _told("patched")


def _wrapped_train(original: Any) -> Any:
    @functools.wraps(original)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        with explained():
            from resafe.finetune.session import session_of

            session = session_of(self)
        return session.train(functools.partial(original, self), *args, **kwargs)

    train.__resafe__ = True  # type: ignore[attr-defined]
    return train


def _wrapped_save(original: Any) -> Any:
    @functools.wraps(original)
    def save_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if "_resafe_session" in vars(self):
            self._resafe_session.record.saved(kwargs.get("output_dir") or (args[0] if args else None) or self.args.output_dir)
        return result

    return save_model


class explained:
    """Under `resafe run`, whatever stops the mitigation from being applied ends the process with exit code 3 and one line."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None or isinstance(error, (KeyboardInterrupt, SystemExit)) or not os.environ.get(RECEIPTS):
            return
        reason = str(error) or kind.__name__
        if isinstance(error, ImportError):
            reason = f"resafe cannot be imported by {sys.executable} ({error}): install resafe in the environment of the training command"
        elif kind.__name__ != "ResafeError":  # a defect of ours, or a library that we do not know: keep the trace for the report
            import traceback

            traceback.print_exception(kind, error, trace)
            reason = f"{kind.__name__}: {reason}"
        _told("failed", reason=reason)
        sys.stderr.write(f"resafe: the mitigation was NOT applied: {reason}\n")
        sys.stderr.flush()
        raise SystemExit(EXIT_NOT_APPLIED) from error


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `transformers.trainer` with the finders behind it, and patches it right after it was executed."""

    def __init__(self) -> None:
        self.busy = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != MODULE or self.busy:
            return None
        self.busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The module's own loader (source, code and data included), with `patch` after execution."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # nobody meets this loader again
        self.loader.exec_module(module)
        patch(module)
