"""Kept, degraded or unclear: what one judge's verdicts on the same prompts, before and after, allow to be said.

Decided by the paired interval (stats.non_inferior), never by "p > 0.05". Verdicts that are missing are filled in both ways;
a decision that would change is none. Prompts needed: from which Tango's interval of the table that was seen, scaled up and
widened by the normal quantile of the power times the standard error, is clear of the limit (or of no change).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.stats import norm

from resafe.eval import stats

Decision = Literal["kept", "degraded", "unclear", "not asked"]
Binary = list[bool | None]  # one vote per prompt; None: unscored
Reason = Literal["", "few prompts", "missing verdicts", "no verdicts"]
POWER = 0.8  # chance that the number of prompts that is called for suffices
Z_POWER = float(norm.ppf(POWER))
MOST = 1_000_000  # prompts; beyond this no number is named


@dataclass(frozen=True)
class Rule:
    """What is asked of a rate. Rates and differences are shares in [0, 1]."""

    limit: float | None  # the largest change for the worse; or, as a floor, the lowest rate. None: nothing is asked
    higher_is_better: bool
    floor: bool = False
    level: float = 0.95  # of the interval that must lie within the limit for "kept"
    strict: float = 0.95  # of the interval that must exclude "no change" for "degraded", corrected for multiplicity

    def decide(self, before: Sequence[bool], after: Sequence[bool]) -> Decision:
        if self.limit is None:
            return "not asked"
        if not after:
            return "unclear"
        if self.floor:
            k, n = sum(after), len(after)
            if stats.wilson(k, n, self.level)[0] >= self.limit:
                return "kept"
            return "degraded" if stats.wilson(k, n, self.strict)[1] < self.limit else "unclear"
        if stats.non_inferior(before, after, self.limit, self.level, self.higher_is_better) == "kept":
            return "kept"
        strictly = stats.non_inferior(before, after, self.limit, self.strict, self.higher_is_better)
        return "degraded" if strictly == "degraded" else "unclear"

    def beyond(self, before: Sequence[bool], after: Sequence[bool]) -> bool:
        """Whether the estimate itself, whatever its interval, is worse than what is allowed."""
        if self.limit is None or not after:
            return False
        if self.floor:
            return sum(after) / len(after) < self.limit
        change = (sum(after) - sum(before)) / len(after)
        return (-change if self.higher_is_better else change) > self.limit


@dataclass(frozen=True)
class Rate:
    """A rate with its Wilson interval; None where nothing was scored."""

    value: float | None
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """One judge on one suite, or on several together. Rates and differences are shares in [0, 1]."""

    judge: str
    suites: tuple[str, ...]
    n: int  # prompts
    scored: int  # prompts with a verdict before and after (for a floor: after)
    before: Rate
    after: Rate
    difference: float | None  # after - before, over the prompts scored on both sides
    low: float | None
    high: float | None
    decision: Decision
    at_worst: Decision  # if every missing verdict went against the model after fine-tuning
    reason: Reason  # why it is unclear
    beyond: bool  # the estimate is worse than the limit
    needed: int | None  # prompts from which it could be told

    @property
    def stands_out(self) -> bool:
        """Worse than the limit by its estimate, or perhaps by the verdicts that are missing."""
        return self.beyond or self.at_worst == "degraded"

    @property
    def scope(self) -> str:
        return self.suites[0] if len(self.suites) == 1 else f"{len(self.suites)} suites"


def measure(judge: str, suites: tuple[str, ...], before: Binary, after: Binary, rule: Rule) -> Comparison:
    """Compare two columns of votes, prompt by prompt."""
    both = [(b, a) for b, a in zip(before, after) if a is not None and b is not None]
    one, two = [b for b, _ in both], [a for _, a in both]
    if rule.floor:
        two = [a for a in after if a is not None]
    found = rule.decide(one, two)
    worst, best = (rule.decide(*_filled(before, after, rule, against)) for against in (True, False))
    reason: Reason = ""
    if found != "not asked" and not two:
        reason = "no verdicts"
    elif not found == worst == best:
        found, reason = "unclear", "missing verdicts"
    elif found == "unclear":
        reason = "few prompts"
    change = stats.paired_difference([b for b, _ in both], [a for _, a in both], rule.level) if both else None
    difference, low, high = change or (None, None, None)
    return Comparison(
        judge, suites, len(after), len(two), _rate(before, rule.level), _rate(after, rule.level),
        difference, low, high, found, worst, reason, rule.beyond(one, two),
        prompts_needed(one, two, rule) if reason == "few prompts" else None,
    )  # fmt: skip


def _filled(before: Binary, after: Binary, rule: Rule, against: bool) -> tuple[list[bool], list[bool]]:
    """Missing verdicts against the model after fine-tuning (bad after, good before), or for it."""
    good = rule.higher_is_better
    first, second = (good, not good) if against else (not good, good)
    return [first if b is None else b for b in before], [second if a is None else a for a in after]


def _rate(column: Binary, level: float) -> Rate:
    scored = [v for v in column if v is not None]
    return Rate(sum(scored) / len(scored) if scored else None, *stats.wilson(sum(scored), len(scored), level))


def prompts_needed(before: Sequence[bool], after: Sequence[bool], rule: Rule) -> int | None:
    """Prompts that make an unclear decision clear with probability about POWER, if the change (for a floor, the rate) is what
    it was here; more than there were. None where no number does (below MOST).
    """
    if (limit := rule.limit) is None:
        return None
    if rule.floor:
        return stats.smallest(_floor_clear(sum(after) / len(after), rule, limit), MOST)
    table = stats.crosstab(before, after)
    a, b, c, d = (x / len(after) for x in (reversed(table) if rule.higher_is_better else table))  # of what is worse
    spread = math.sqrt(max(0.0, b + c - (c - b) ** 2))

    def clear(n: int) -> bool:
        at_n, slack = stats.Table(n * a, n * b, n * c, n * d), Z_POWER * spread / math.sqrt(n)
        if c - b > limit:
            return stats.tango(at_n, rule.strict).low - slack > 0
        return stats.tango(at_n, rule.level).high + slack < limit

    return stats.smallest(clear, MOST)


def _floor_clear(p: float, rule: Rule, limit: float) -> Callable[[int], bool]:
    def clear(n: int) -> bool:
        slack = Z_POWER * math.sqrt(p * (1 - p) / n)
        if p < limit:
            return stats.wilson(p * n, n, rule.strict)[1] + slack < limit
        return stats.wilson(p * n, n, rule.level)[0] - slack >= limit

    return clear
