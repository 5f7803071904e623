"""What breaking and repairing cost: processor or accelerator time, training tokens and peak memory, and what answering takes.

Fine-tuning costs little and so does breaking a model; the report says beside it what putting safety back took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resafe.eval.results import Results

Spent = dict[str, float]  # "GPU-s" or "CPU-s" -> seconds; a block of work counts by the accelerator, if it used one


@dataclass(frozen=True)
class Cost:
    """Of one (attack, mitigation), the mean over its training seeds; empty or None where nothing was recorded.

    `train` is the whole fine-tuning, mitigations inside it included; `making` adds the repairs; `answering` is 100 prompts.
    """

    train: Spent
    making: Spent
    tokens: int | None  # trained on
    peak_mb: float | None  # while training and repairing, of the accelerator if one was used
    answering: Spent
    answering_mb: float | None


def cost(results: Results, targets: Sequence[str]) -> Cost:
    """The cost of targets that differ in their training seed alone."""
    entries = [results.meta.get("targets", {}).get(t, {}) for t in targets]
    made = [e.get("cost") or {} for e in entries]
    parts = [u for m in made for u in m.values()]
    fresh = [e for e in entries if e.get("answers") and not e.get("reused")]
    return Cost(
        _mean([_spent([m["train"]]) for m in made if "train" in m]),
        _mean([_spent(list(m.values())) for m in made if m]),
        round(sum(u.get("tokens", 0) for u in parts) / len([m for m in made if m])) if parts else None,
        max((_peak(u) for u in parts), default=None),
        _mean([{u: 100 * x / e["answers"] for u, x in _spent([e]).items()} for e in fresh]),
        max((_peak(e) for e in fresh), default=None),
    )


def _spent(usages: Sequence[Mapping[str, Any]]) -> Spent:
    out: Spent = {}
    for usage in usages:
        unit, key = ("GPU-s", "gpu_seconds") if usage.get("gpu_seconds") else ("CPU-s", "cpu_seconds")
        out[unit] = out.get(unit, 0.0) + float(usage.get(key, 0.0))
    return out


def _peak(usage: Mapping[str, Any]) -> float:
    return float(usage.get("peak_gpu_mb" if usage.get("gpu_seconds") else "peak_rss_mb", 0.0))


def _mean(found: Sequence[Spent]) -> Spent:
    units = dict.fromkeys(u for spent in found for u in spent)
    return {u: sum(spent.get(u, 0.0) for spent in found) / len(found) for u in units}


def asymmetry(costs: Mapping[tuple[str, str], Cost]) -> str:
    """One sentence: what breaking took, and what each repair took on top, cheapest and dearest; "" where none is recorded."""
    said = []
    for attack in dict.fromkeys(a for a, _ in costs if a != "none"):
        broken = costs.get((attack, "none"))
        if broken is None or not broken.train:
            continue
        extra = {m: _extra(c, broken) for (a, m), c in costs.items() if a == attack and m != "none" and c.making}
        known = sorted(extra.items(), key=lambda item: sum(item[1].values()))
        if known:
            said.append(f"{attack} took {_text(broken.train)}, repairing it {_span(known)} more")
    return f"What breaking cost, and what repairing cost: {'; '.join(said)}." if said else ""


def _extra(c: Cost, broken: Cost) -> Spent:
    """What a mitigation took beyond the fine-tuning that broke the model."""
    return {u: max(0.0, x - broken.train.get(u, 0.0)) for u, x in c.making.items()}


def _span(known: Sequence[tuple[str, Spent]]) -> str:
    (first, low), (last, high) = known[0], known[-1]
    return f"{_text(low)} ({first})" if first == last else f"{_text(low)} ({first}) to {_text(high)} ({last})"


def _text(spent: Spent) -> str:
    used = {u: x for u, x in spent.items() if x > 0} or dict.fromkeys(list(spent)[:1], 0.0)
    return " + ".join(f"{x:.3g} {u}" for u, x in used.items()) or "–"


def told(c: Cost) -> dict[str, str]:
    """A cost as texts for a table."""
    return {
        "making": _text(c.making),
        "tokens": "–" if not c.tokens else f"{c.tokens:,}",
        "peak": "–" if not c.peak_mb else f"{c.peak_mb:,.0f} MB",
        "answering": _text(c.answering),
        "answering_peak": "–" if not c.answering_mb else f"{c.answering_mb:,.0f} MB",
    }
