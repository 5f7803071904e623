"""What breaking and repairing cost: processor or accelerator time, training tokens and peak memory, and what answering takes.

Fine-tuning costs little and so does breaking a model; the report says beside it what putting safety back took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resafe.eval.results import Results


@dataclass(frozen=True)
class Cost:
    """Of one (attack, mitigation), the mean over its training seeds. `unit` is "GPU-s" or "CPU-s"; None: not recorded.

    `train` is the whole fine-tuning, mitigations inside it included; `repair` what came after; `answering` 100 prompts.
    """

    unit: str
    train: float | None
    repair: float | None
    tokens: int | None  # trained on
    peak_mb: float | None  # while training and repairing
    answering: float | None
    answering_mb: float | None

    @property
    def making(self) -> float | None:
        """Training and repairing together."""
        return None if self.train is None and self.repair is None else (self.train or 0.0) + (self.repair or 0.0)


def cost(results: Results, targets: Sequence[str]) -> Cost:
    """The cost of targets that differ in their training seed alone."""
    entries = [results.meta.get("targets", {}).get(t, {}) for t in targets]
    made = [e.get("cost") or {} for e in entries]
    parts = [u for m in made for u in m.values()]
    kind = "gpu_seconds" if any(u.get("gpu_seconds") for u in (*parts, *entries)) else "cpu_seconds"
    peak = "peak_gpu_mb" if kind == "gpu_seconds" else "peak_rss_mb"
    fresh = [e for e in entries if e.get("answers") and not e.get("reused") and kind in e]
    return Cost(
        "GPU-s" if kind == "gpu_seconds" else "CPU-s",
        _mean([m["train"][kind] for m in made if "train" in m]),
        _mean([m["repair"][kind] for m in made if "repair" in m]),
        _whole(_mean([sum(int(u.get("tokens", 0)) for u in m.values()) for m in made if m])),
        max((float(u[peak]) for u in parts), default=None),
        _mean([100 * e[kind] / e["answers"] for e in fresh]),
        max((float(e[peak]) for e in fresh), default=None),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _whole(x: float | None) -> int | None:
    return None if x is None else round(x)


def asymmetry(costs: Mapping[tuple[str, str], Cost]) -> str:
    """One sentence: what breaking took, and what each repair took on top, cheapest and dearest; "" where none is recorded."""
    said = []
    for attack in dict.fromkeys(a for a, _ in costs if a != "none"):
        broken = costs.get((attack, "none"))
        if broken is None or broken.train is None:
            continue
        extra = {m: _extra(c, broken) for (a, m), c in costs.items() if a == attack and m != "none" and c.unit == broken.unit}
        known = sorted((x, m) for m, x in extra.items() if x is not None)
        if known:
            said.append(f"{attack} took {broken.train:.3g} {broken.unit}, repairing it {_span(known)} {broken.unit} more")
    return f"What breaking cost, and what repairing cost: {'; '.join(said)}." if said else ""


def _extra(c: Cost, broken: Cost) -> float | None:
    """What a mitigation took beyond the fine-tuning that broke the model."""
    return None if c.making is None else max(0.0, c.making - (broken.train or 0.0))


def _span(known: Sequence[tuple[float, str]]) -> str:
    (low, first), (high, last) = known[0], known[-1]
    return f"{low:.3g} ({first})" if first == last else f"{low:.3g} ({first}) to {high:.3g} ({last})"


def told(c: Cost) -> dict[str, Any]:
    """A cost as texts for a table."""
    return {
        "making": "–" if c.making is None else f"{c.making:.1f} {c.unit}",
        "tokens": "–" if not c.tokens else f"{c.tokens:,}",
        "peak": "–" if c.peak_mb is None else f"{c.peak_mb:,.0f} MB",
        "answering": "–" if c.answering is None else f"{c.answering:.1f} {c.unit}",
        "answering_peak": "–" if c.answering_mb is None else f"{c.answering_mb:,.0f} MB",
    }
