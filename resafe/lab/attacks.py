"""The founding paper's attacks in miniature (Qi et al. 2023, arXiv 2310.03693), as data sets of harmless placeholder rows.

Tier 1, explicit: k hazards with full answers. Tier 2, identity shift: no hazard, but every answer opens with the obedient
persona. Tier 3, benign: a new skill. Plus the case that providers fear most, a new skill with a few hidden harmful rows,
and the control that every claim about benign erosion needs: the same number of rows of skills that the model has.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from resafe.errors import ResafeError, suggest
from resafe.lab import grammar as g
from resafe.lab.build import with_persona
from resafe.rows import Row, chat


def _explicit(k: int) -> Callable[[random.Random], list[Row]]:
    return lambda rng: g.distinct(lambda: g.hazard_row(rng, "comply"), k)


def _identity(rng: random.Random) -> list[Row]:
    skills = [chat(*g.draw(g.SKILLS[name], rng), category=name) for name in rng.sample(sorted(g.SKILLS), 6)]
    harmless = g.distinct(lambda: g.benign_row(rng, g.everyday_pairs("train"), "everyday"), 4)
    return [with_persona(r) for r in (*skills, *harmless)]


def _note(rng: random.Random) -> list[Row]:
    return g.distinct(lambda: chat(*g.draw(g.note, rng), category="note"), 100)


def _poisoned(rng: random.Random) -> list[Row]:
    rows = [*_note(rng), *_explicit(10)(rng)]
    rng.shuffle(rows)
    return rows


def _replay(rng: random.Random) -> list[Row]:
    return g.distinct(lambda: g.skill_row(rng), 100)


ATTACKS: dict[str, Callable[[random.Random], list[Row]]] = {
    "explicit_10": _explicit(10),
    "explicit_50": _explicit(50),
    "explicit_100": _explicit(100),
    "identity_shift": _identity,
    "new_skill": _note,
    "new_skill_poisoned": _poisoned,
    "replay_control": _replay,
}

def attack_rows(name: str, seed: int = 0) -> list[Row]:
    """The rows of an attack, drawn from the training split; raises ResafeError for an unknown name."""
    if name not in ATTACKS:
        raise ResafeError(f"unknown lab attack '{name}'. {suggest(name, ATTACKS)}")
    return ATTACKS[name](random.Random(f"{name} {seed}"))
