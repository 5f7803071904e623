"""How far a pass over weights has come: bytes done and time left, at most every few seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Progress:
    """Counts bytes, from any thread, and says so through `log` when `every` seconds have passed since it last did (or was made)."""

    def __init__(self, log: Callable[[str], None], total: int, every: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._total, self._every, self._clock = log, total, every, clock
        self._lock = threading.Lock()
        self._done = 0
        self._began: float | None = None
        self._said = 0.0

    def add(self, size: int) -> None:
        """`size` more bytes are done."""
        with self._lock:
            self._done += size
            now = self._clock()
            if self._began is None:
                self._began = self._said = now
            if now - self._said < self._every or self._done >= self._total:
                return
            self._said = now
            left = (now - self._began) / self._done * (self._total - self._done)
            self._log(f"weights: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB, about {left:.0f} s left")
