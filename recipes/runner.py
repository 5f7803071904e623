"""Run a recipe's cells, evaluate them, report. What is finished is never done again: the same command resumes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from resafe.errors import ResafeError
from resafe.eval import Results, TargetSpec, evaluate, load_suite
from resafe.eval.judges import get_judge, panel
from resafe.eval.variants import load_variants
from resafe.files import digest, write_json, write_text
from resafe.finetune.repair import repair
from resafe.finetune.train import train
from resafe.fingerprint import cache_home, model_fingerprint
from resafe.guards.filter import OutputFilter
from resafe.manifest import read
from resafe.mitigations import Named
from resafe.recipes.plan import Cell, attack_rows, plan, summary
from resafe.recipes.schema import Recipe

Log = Callable[[str], None]
DONE = "done.json"


def bench(recipe: Recipe, output: Path, log: Log = lambda _: None) -> Results:
    """Run every cell of `recipe` under `output`, evaluate, and save results.json, results.csv and items.json there.

    A repair that refuses its checkpoint (no strength keeps utility, say) is a finding: it is named with its reason in
    `meta["refused"]`, and the other cells go on.
    """
    cells = plan(recipe, log)
    log(", ".join(f"{v} {k}" for k, v in summary(cells).items()))
    write_json(output / "recipe.json", recipe.model_dump(mode="json"))
    total = len(cells) + len(recipe.seeds)
    parts, refused = [], dict[str, str]()
    for i, (spec, address) in enumerate(_targets(recipe, cells, output, refused, log)):
        log(f"[{i + 1}/{total}] {spec.name}: evaluating")
        parts.append(_evaluated(recipe, spec, output / "evaluations" / _evaluation(recipe, spec, address)))
    results = Results.merge(parts)
    results.meta["refused"] = refused
    results.save(output)
    return results


def _targets(recipe: Recipe, cells: list[Cell], output: Path, refused: dict[str, str], log: Log) -> Iterator[tuple[TargetSpec, str]]:
    """(target, address): the untouched model of every seed, then every cell, made if it is not there yet."""
    for seed in recipe.seeds:
        model = next(c.model for c in cells if c.seed == seed)
        yield TargetSpec(f"before/seed{seed}", model, seed=seed), model_fingerprint(model)[:16]
    for cell in cells:
        try:
            folder = make(recipe, cell, output / "cells", log)
        except Refused as error:
            refused[cell.name] = str(error)
            log(f"{cell.name}: refused: {error}")
            continue
        yield TargetSpec(cell.name, folder, attack=cell.attack, mitigation=cell.mitigation, seed=cell.seed), cell.address


class Refused(ResafeError):
    """A repair said that it cannot repair this checkpoint."""


def make(recipe: Recipe, cell: Cell, cells: Path, log: Log) -> Path:
    """The checkpoint of a cell, fine-tuned and repaired as far as that has not happened yet."""
    tuned = cells / cell.tuned
    if not (tuned / DONE).is_file():
        log(f"{cell.attack}, seed {cell.seed}: fine-tuning" + "".join(f" with {m.name}" for m in cell.before))
        _train(recipe, cell, tuned, log)
    last = tuned
    for m, link in zip(cell.after, cell.links):
        home = cells / link
        if not (home / DONE).is_file():
            log(f"{cell.name}: {m.name}")
            _clear(home / "model")
            try_repair(
                last / "model", home / "model", [m.spec], aligned=cell.model, data=tuned / "data.jsonl", safety_data=recipe.safety,
                heldout=_file(recipe.attacks[cell.attack].heldout, cell.seed, home / "heldout.jsonl"), seed=cell.seed, log=log,
            )  # fmt: skip
            _done(home, cell, m)
        last = home
    return last / "model"


def try_repair(tuned: Path, output: Path, mitigations: list[dict[str, Any]], **how: Any) -> None:
    """`repair`, whose refusals are told from other errors."""
    try:
        repair(tuned, output, mitigations, **how)
    except ResafeError as error:
        raise Refused(str(error)) from error


def _train(recipe: Recipe, cell: Cell, home: Path, log: Log) -> None:
    attack = recipe.attacks[cell.attack]
    _clear(home / "model")
    data = _file(attack.data, cell.seed, home / "data.jsonl")
    train(
        cell.model, str(data), home / "model", [m.spec for m in cell.before], attack.train, recipe.safety,
        _file(attack.heldout, cell.seed, home / "heldout.jsonl"), cell.seed, log,
    )  # fmt: skip
    _done(home, cell)


def _file(data: str | None, seed: int, path: Path) -> Path | None:
    """The rows of a data argument as a JSON Lines file."""
    if data is None:
        return None
    return write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in attack_rows(data, seed)))


def _done(home: Path, cell: Cell, repaired: Named | None = None) -> None:
    """Written last: a folder with this file is complete."""
    by = repaired.spec if repaired else [m.spec for m in cell.before]
    write_json(home / DONE, {"attack": cell.attack, "seed": cell.seed, "by": by})


def _clear(folder: Path) -> None:
    """Remove what an interruption between the last rename and the done marker left."""
    if folder.is_dir():
        shutil.rmtree(folder)


def _evaluation(recipe: Recipe, spec: TargetSpec, address: str) -> str:
    """Address of an evaluation: the checkpoint and its name, the suites, the judges, the limit, the evaluator's version."""
    guard = (read(spec.folder) or {}).get("guard") if spec.folder else None
    filtered = OutputFilter.from_entry(guard).identity if guard else None
    return digest([address, spec.name, measured_by(recipe), filtered])[:16]


def measured_by(recipe: Recipe) -> list[Any]:
    """What decides a number beside the checkpoint: prompts, judges and their versions, the evaluator's version."""
    suites = [load_suite(s, recipe.limit) for s in recipe.suites]
    variants = [v.model_dump(mode="json") for v in load_variants(recipe.variants)]
    judges = sorted({name for s in suites for name in panel(s.suite, recipe.judges)})
    prompts = [[s.suite.model_dump(mode="json"), [[c.id, c.key, c.reference] for c in s.cases]] for s in suites]
    return [digest([prompts, variants]), [get_judge(j).identity for j in judges], version("resafe")]


def _evaluated(recipe: Recipe, spec: TargetSpec, folder: Path) -> Results:
    """Evaluate one target, or read what an earlier run found."""
    if (folder / DONE).is_file():
        return Results.load(folder)
    found = evaluate(
        [spec], recipe.suites, judges=recipe.judges, limit=recipe.limit, output=folder, variants=recipe.variants, store=cache_home() / "store",
    )  # fmt: skip
    write_json(folder / DONE, {"target": spec.name})
    return found
