"""Seconds and peak memory of a block of work in this process."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Usage:
    """`peak_rss_mb` is the block's own peak on Linux; elsewhere the process's peak so far."""

    seconds: float = 0.0
    peak_rss_mb: float = 0.0


@contextmanager
def measured() -> Iterator[Usage]:
    """Yield a `Usage` that is filled in when the block ends."""
    usage, start = Usage(), time.perf_counter()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak (VmHWM)
    try:
        yield usage
    finally:
        usage.seconds = round(time.perf_counter() - start, 3)
        usage.peak_rss_mb = round(_peak_mb(), 1)


def _peak_mb() -> float:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM:")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
