"""What a block of work in this process costs: seconds, processor and accelerator time, peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Usage:
    """`cpu_seconds` are of all threads and ended child processes; `gpu_seconds` is the time that an accelerator was held.

    `peak_rss_mb` is the block's own peak on Linux; elsewhere the process's peak so far. `tokens` are those that models were
    trained on, as `count_tokens` was told.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    peak_rss_mb: float = 0.0
    peak_gpu_mb: float = 0.0
    tokens: int = 0


_open: list[Usage] = []


@contextmanager
def measured() -> Iterator[Usage]:
    """Yield a `Usage` that is filled in when the block ends."""
    usage, start, cpu = Usage(), time.perf_counter(), _cpu()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak (VmHWM)
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()
    _open.append(usage)
    try:
        yield usage
    finally:
        _open[:] = [u for u in _open if u is not usage]  # equal ones may be open
        usage.seconds = round(time.perf_counter() - start, 3)
        usage.cpu_seconds = round(_cpu() - cpu, 3)
        usage.peak_rss_mb = round(_peak_mb(), 1)
        if cuda := _cuda():
            usage.gpu_seconds = usage.seconds
            usage.peak_gpu_mb = round(cuda.max_memory_allocated() / 2**20, 1)


def count_tokens(tokens: int) -> None:
    """Add to the tokens of every block that is being measured."""
    for usage in _open:
        usage.tokens += tokens


def added(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, float]:
    """Two blocks of work as one: times add up, of the peaks the higher one counts."""
    both = {k: (first.get(k, 0), second.get(k, 0)) for k in (*first, *second)}
    return {k: max(pair) if k.startswith("peak") else round(sum(pair), 3) for k, pair in both.items()}


def _cpu() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _cuda() -> Any:
    """`torch.cuda` where torch has been imported and sees a device."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _peak_mb() -> float:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM:")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
