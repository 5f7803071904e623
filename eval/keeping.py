"""Answers and verdicts that are kept as they come, so that a killed evaluation goes on where it was.

What is asked twice is answered from the store only if everything that could change the answer is the same: the suite and its
version, the prompt's id, the very tokens, how they are sampled, and the model to its last byte; for a verdict, the judge
(weights, prompt, parser) and the exchange.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from resafe.backends import Backend, Request
from resafe.errors import ResafeError
from resafe.files import digest
from resafe.generate import Answer
from resafe.guards import Exchange, Guard, Verdict
from resafe.store import Log, Store

Say = Callable[[str], None]
EVERY = 5.0  # seconds between two lines of progress
SERVED = ("chat:", "moderation")  # how the specs of served guards begin
AT_ONCE = 64  # exchanges put to a guard in one call


def address(origin: Sequence[Any], rendered: Sequence[Any], request: Request, identity: Any) -> str:
    """sha256 of everything that decides an answer; `origin` is the suite's name and version, the prompt's id, the sample."""
    how = [request.max_new_tokens, asdict(request.sampling)]
    return digest([list(origin), list(rendered), how, identity])


def answered(
    backend: Backend, requests: Sequence[Request], origins: Sequence[Sequence[Any]], kept: Log | None, identity: Any, say: Say
) -> tuple[list[Answer], int]:
    """An answer to each request, and how many came from `kept`. A missing one (`Answer.error`) is not kept: ask again."""
    found: dict[int, Answer] = {}
    addresses: list[str] = []
    if kept is not None:
        addresses = [address(o, backend.rendered(r), r, identity) for o, r in zip(origins, requests)]
        found = {i: Answer(**kept.get(a)) for i, a in enumerate(addresses) if a in kept}
    reused = len(found)
    if reused and backend.identity is None:
        say(f"going on with {reused} answers of an interrupted run: the server must still serve the same model")
    open_ = [i for i in range(len(requests)) if i not in found]
    progress = Progress(len(open_), say)
    for position, answer in backend.stream([requests[i] for i in open_]) if open_ else ():
        i = open_[position]
        if i in found:
            raise ResafeError(f"{backend.name} answered one request twice.")
        found[i] = answer
        if kept is not None and not answer.error:
            kept.put(addresses[i], {"text": answer.text, "tokens": answer.tokens, "finished": answer.finished})
        progress.step()
    if len(found) != len(requests):
        raise ResafeError(f"target {backend.name} gave {len(found)} answers to {len(requests)} prompts.")
    return [found[i] for i in range(len(requests))], reused


class Progress:
    """Says every few seconds how far a long work has come and about how long it will take."""

    def __init__(self, total: int, say: Say) -> None:
        self.total, self.say, self.done = total, say, 0
        self.start = self.last = time.monotonic()

    def step(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last >= EVERY and self.done < self.total:
            self.last = now
            left = (now - self.start) / self.done * (self.total - self.done)
            self.say(f"{self.done} of {self.total}, about {left:.0f} s left")


class KeepingGuard:
    """A guard whose verdicts are kept, by its identity and the exchange. What it could not score is asked again."""

    def __init__(self, guard: Guard, store: Store, only_for: str = "", say: Say = lambda _: None) -> None:
        """`only_for` names the run that the verdicts are kept for; without it, any run finds them."""
        self.guard, self.say = guard, say
        self.name, self.identity, self.scale = guard.name, guard.identity, guard.scale
        self.reads_openings = bool(getattr(guard, "reads_openings", False))
        self.kept = store.log("verdicts", ["served", guard.identity, only_for] if only_for else guard.identity)

    def classify(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Verdicts from the store, or the guard's own, kept after every few exchanges."""
        addresses = [digest([self.identity, messages, response]) for messages, response in exchanges]
        found = {i: _read(self.kept.get(a)) for i, a in enumerate(addresses) if a in self.kept}
        open_ = [i for i in range(len(exchanges)) if i not in found]
        progress = Progress(len(open_), self.say)
        for start in range(0, len(open_), AT_ONCE):
            part = open_[start : start + AT_ONCE]
            verdicts = self.guard.classify([exchanges[i] for i in part])
            if len(verdicts) != len(part):
                raise ValueError(f"{len(verdicts)} verdicts on {len(part)} answers")
            for i, verdict in zip(part, verdicts):
                found[i] = verdict
                if not verdict.unscored:
                    self.kept.put(addresses[i], asdict(verdict))
            progress.step(len(part))
        return [found[i] for i in range(len(exchanges))]


def kept_under(guard: str, run: str) -> str:
    """The run that a guard's verdicts are kept for: this one for a served guard, whose weights cannot be told; else any."""
    return run if guard.startswith(SERVED) else ""


def _read(value: dict[str, Any]) -> Verdict:
    return Verdict(**{**value, "categories": tuple(value["categories"])})
