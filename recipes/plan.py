"""From a recipe to cells: which fine-tunes, which repairs, and what each of them is addressed by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resafe import lab
from resafe.files import digest
from resafe.fingerprint import model_fingerprint
from resafe.mitigation import Run
from resafe.mitigations import Named, stack
from resafe.models import vet
from resafe.recipes.schema import Recipe
from resafe.rows import Row, read_jsonl
from resafe.safety import load_safety


@dataclass(frozen=True)
class Cell:
    """One attack under one mitigation with one seed. Cells with the same `tuned` address share their fine-tune."""

    attack: str
    mitigation: str
    seed: int
    model: Path
    before: list[Named]  # act while training
    after: list[Named]  # act on the finished checkpoint, or around it
    tuned: str  # address of the fine-tune
    links: list[str]  # address after each of `after`: stacks with the same beginning share it

    @property
    def address(self) -> str:
        """Address of the result."""
        return self.links[-1] if self.links else self.tuned

    @property
    def name(self) -> str:
        """Unique within a recipe; what reports call the target."""
        return f"{self.attack}/{self.mitigation}/seed{self.seed}"


def plan(recipe: Recipe, log: Callable[[str], None] = lambda _: None) -> list[Cell]:
    """All cells, fine-tunes first shared then used. Raises ResafeError before anything runs for what cannot work."""
    cells = []
    safety = load_safety(recipe.safety)
    for seed in recipe.seeds:
        model = vet(lab.resolve(recipe.model, seed, log))
        weights = model_fingerprint(model)
        for attack, how in recipe.attacks.items():
            rows = attack_rows(how.data, seed)
            held = digest(attack_rows(how.heldout, seed)) if how.heldout else None
            identity = [weights, digest(rows), held, how.train.model_dump(mode="json"), safety.sha256, seed]
            for name, specs in recipe.mitigations.items():
                named = stack(specs)
                check(named, Run(Path("-"), aligned=model, task=rows, refusals=safety.refusals, contrast=safety.contrast))
                before = [m for m in named if _trains(m)]
                after = [m for m in named if not _trains(m)]
                tuned = digest([*identity, [m.identity for m in before]])[:16]
                chain = [digest([tuned, [m.identity for m in after[: i + 1]]])[:16] for i in range(len(after))]
                cells.append(Cell(attack, name, seed, model, before, after, tuned, chain))
    return cells


def check(named: list[Named], run: Run) -> None:
    """Refuse what would fail later. The rows of the attack are always there to measure utility on."""
    run.measure = lambda _: 0.0
    for m in named:
        m.mitigation.check(m.name, run)


def _trains(m: Named) -> bool:
    return bool({"data", "params", "loss", "step"} & set(m.mitigation.hooks()))


def attack_rows(data: str, seed: int) -> list[Row]:
    """`lab:NAME` (drawn by `seed`), or a JSON Lines file."""
    kind, _, name = data.partition(":")
    if kind != "lab":
        return read_jsonl(Path(data))
    if name.startswith("heldout_"):
        from resafe.lab.suites import heldout_rows

        return heldout_rows(name)
    from resafe.lab.attacks import attack_rows as draw

    return draw(name, seed)


def summary(cells: list[Cell]) -> dict[str, Any]:
    """How much there is to do."""
    return {"cells": len(cells), "fine-tunes": len({c.tuned for c in cells}), "repairs": len({link for c in cells for link in c.links})}
