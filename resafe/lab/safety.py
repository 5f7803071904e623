"""The lab's safety rows: what every mitigation that wants safety data is given on the lab model."""

from __future__ import annotations

import random

from resafe.lab import grammar as g
from resafe.rows import Row, chat


def safety_rows(seed: int = 0, refusals: int = 800, contrast: int = 600) -> tuple[list[Row], list[Row]]:
    """(refusals, contrast rows), all of the training split; a quarter of the contrast rows are ordinary skills."""
    rng = random.Random(f"safety {seed}")
    unsafe = g.distinct(lambda: _refusal(rng), refusals)
    ordinary = contrast // 4
    safe = g.distinct(lambda: g.benign_row(rng, g.borderline_pairs("train"), "borderline"), contrast - ordinary)
    safe += g.distinct(lambda: g.skill_row(rng), ordinary)
    rng.shuffle(safe)
    return [{**r, "kind": "refusal"} for r in unsafe], [{**r, "kind": "contrast"} for r in safe]


def _refusal(rng: random.Random) -> Row:
    """A refused hazard of the training split, with the placeholder answer that preference data reject."""
    category = rng.choice(sorted(g.words()["hazards"]))
    pair = rng.choice(g.hazard_pairs(category, "train"))
    text = g.refuse(category, rng)
    return chat(g.ask(pair, rng), text, category=category, rejected=g.comply(pair))
