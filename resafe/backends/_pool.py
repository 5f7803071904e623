"""Work on many waiting requests at once: a bounded pool that can be left at any moment, and the pace at which it may ask."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


def as_finished(jobs: Sequence[T], work: Callable[[T, threading.Event], Any], workers: int) -> Iterator[tuple[T, Any]]:
    """(job, result of `work(job, stop)`), in the order in which they finish; an exception of one job ends all.

    Whoever stops asking leaves at once: no further job is begun, `stop` is set for those that wait, and the threads, being
    daemons, hold nobody up. (A ThreadPoolExecutor would first finish what it has begun.)
    """
    todo: SimpleQueue[T] = SimpleQueue()
    done: SimpleQueue[tuple[T, Any, BaseException | None]] = SimpleQueue()
    stop = threading.Event()
    for job in jobs:
        todo.put(job)

    def run() -> None:
        while not stop.is_set():
            try:
                job = todo.get_nowait()
            except Empty:
                return
            try:
                done.put((job, work(job, stop), None))
            except BaseException as error:  # raised again where the results are read
                done.put((job, None, error))
                return

    for _ in range(min(workers, len(jobs))):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in jobs:
            job, result, error = done.get()
            if error is not None:
                raise error
            yield job, result
    finally:
        stop.set()


class Pace:
    """When the next request may go out: at most `per_minute`, evenly spaced, and after every pause that a server asked for."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._clock, self._next, self._lock = clock, clock(), threading.Lock()

    def take(self) -> float:
        """Seconds to wait before sending; every call takes one place in the row."""
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + self._gap
            return turn - now

    def pause(self, seconds: float) -> None:
        """Nobody sends for that long."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)
