"""The shared evaluator: the same prompts to every model, judged, counted and compared in pairs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resafe.eval.auditing import Audit, Thresholds, audit, check_suites
    from resafe.eval.comparison import compare, compare_groups
    from resafe.eval.evaluation import evaluate
    from resafe.eval.pool import pooled
    from resafe.eval.report import render, render_transcripts, table
    from resafe.eval.results import Results
    from resafe.eval.suite import Suite, load_suite
    from resafe.eval.targets import Target, TargetSpec

_HOMES = {
    "Audit": "auditing", "Thresholds": "auditing", "audit": "auditing", "check_suites": "auditing",
    "compare": "comparison", "compare_groups": "comparison", "evaluate": "evaluation", "pooled": "pool",
    "render": "report", "render_transcripts": "report", "table": "report", "Results": "results", "Suite": "suite", "load_suite": "suite",
    "Target": "targets", "TargetSpec": "targets",
}  # fmt: skip
__all__ = [
    "Audit", "Results", "Suite", "Target", "TargetSpec", "Thresholds", "audit", "check_suites", "compare",
    "compare_groups", "evaluate", "load_suite", "pooled", "render", "render_transcripts",
    "table",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import on first use: the evaluator's parts need scipy and jinja2, `resafe --help` does not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"resafe.eval.{_HOMES[name]}"), name)
