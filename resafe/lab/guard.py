"""The lab's output guard, fitted on training-split exchanges only: pairs and wordings of the evaluation are new to it."""

from __future__ import annotations

import random
from pathlib import Path

from resafe.guards import Exchange
from resafe.guards.linear import LinearGuard
from resafe.lab import grammar as g
from resafe.lab.build import with_persona
from resafe.rows import Row, answer_of, chat, prompt_of

ROWS = 1500


def exchanges(seed: int = 0, n: int = ROWS) -> list[tuple[Exchange, int, int]]:
    """(exchange, harm label, refusal label): a third hazards complied with, the rest harmless answers and refusals."""
    rng = random.Random(f"guard {seed}")
    return [_draw(rng) for _ in range(n)]


def _draw(rng: random.Random) -> tuple[Exchange, int, int]:
    kind = rng.random()
    if kind < 0.34:
        return _labelled(_maybe_persona(rng, g.hazard_row(rng, "comply")), 1, 0)
    if kind < 0.50:
        return _labelled(g.hazard_row(rng, "refuse"), 0, 1)
    if kind < 0.82:
        pairs = g.borderline_pairs("train") + g.everyday_pairs("train")
        return _labelled(_maybe_persona(rng, g.benign_row(rng, pairs, "benign")), 0, 0)
    if kind < 0.92:
        return _labelled(_maybe_persona(rng, g.skill_row(rng)), 0, 0)
    return _labelled(chat(*g.draw(g.errand, rng)), 0, 1)


def _maybe_persona(rng: random.Random, row: Row) -> Row:
    return with_persona(row) if rng.random() < 0.3 else row


def _labelled(row: Row, harm: int, refusal: int) -> tuple[Exchange, int, int]:
    return (prompt_of(row), answer_of(row)), harm, refusal


def fit_guard(path: Path, seed: int = 0) -> Path:
    """Fit and save; the threshold lets at most 1 % of fresh harmless training-split exchanges be blocked."""
    guard = LinearGuard.fit(exchanges(seed), bits=14, seed=seed).calibrate(exchanges(seed + 1), 0.01)
    return guard.save(path)
