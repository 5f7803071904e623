"""Recipes: checked before anything runs, cells shared, finished cells never run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from resafe.errors import ResafeError
from resafe.recipes import LAB_DEMO
from resafe.recipes.plan import plan, summary
from resafe.recipes.runner import bench
from resafe.recipes.schema import Recipe, load_recipe, shipped
from resafe.recipes.tell import publish
from resafe.rows import chat
from tests.conftest import write_rows

SMALL: dict[str, Any] = {
    "name": "small", "model": "lab", "safety": "lab", "suites": ["lab_harm", "lab_borderline", "lab_skills"], "limit": 24,
    "attacks": {"explicit_10": {"data": "lab:explicit_10", "train": {"lora": False, "lr": 3e-4, "epochs": 5, "batch": 10, "scheduler": "constant"}}},
    "mitigations": {
        "restore": [{"restore_weights": {"strength": 0.9}}], "filter": [{"filter_output": {"guard_model": "lab"}}],
        "both": [{"restore_weights": {"strength": 0.9}}, {"filter_output": {"guard_model": "lab"}}],
    },
}  # fmt: skip


def saved(value: dict[str, Any], folder: Path) -> Path:
    file = folder / "r.yaml"
    file.write_text(yaml.safe_dump(value))
    return file


@pytest.mark.parametrize("path", shipped())
def test_every_shipped_recipe_is_valid_and_plans(path: str) -> None:
    recipe = load_recipe(path).model_copy(update={"seeds": [0]})
    assert summary(plan(recipe))["fine-tunes"] >= len(recipe.attacks)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sutes": ["x"]}, "unknown key 'sutes'. Did you mean 'suites'"),
        ({"attacks": {"a": {"dta": "x"}}}, "Did you mean 'data'"),
        ({"attacks": {"a": {"data": "x", "train": {"epoch": 1}}}}, "Did you mean 'epochs'"),
        ({"mitigations": {"m": ["mix_safty"]}}, "Did you mean 'mix_safety'"),
        ({"mitigations": {"m": [{"mix_safety": {"ration": 1}}]}}, "Did you mean 'ratio'"),
        ({"name": "a/b"}, "name"),
        ({"attacks": {}}, "attacks"),
    ],
)
def test_a_bad_recipe_is_refused_with_the_key_and_the_nearest(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ResafeError, match=said):
        load_recipe(saved({**SMALL, **change}, tmp_path))


def test_a_recipe_cannot_run_code(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ResafeError, match="not valid YAML"):
        load_recipe(file)


def test_repairs_share_one_fine_tune_and_training_defences_have_their_own() -> None:
    cells = plan(Recipe.model_validate({**SMALL, "mitigations": {**SMALL["mitigations"], "mix": ["mix_safety"]}}))
    tuned = {c.mitigation: c.tuned for c in cells}
    assert tuned["none"] == tuned["restore"] == tuned["filter"] == tuned["both"] != tuned["mix"]
    assert len({c.address for c in cells}) == len(cells)
    links = {c.mitigation: c.links for c in cells}
    assert links["both"][0] == links["restore"][0], "a stack goes on from the repair that it begins with"


def test_an_address_changes_with_everything_that_decides_the_result() -> None:
    def first(**change: Any) -> str:
        return plan(Recipe.model_validate({**SMALL, **change}))[1].address

    attack = SMALL["attacks"]["explicit_10"]
    changed = [
        first(), first(attacks={"explicit_10": {**attack, "data": "lab:explicit_50"}}), first(model="lab:base"),
        first(attacks={"explicit_10": {**attack, "train": {**attack["train"], "lr": 1e-3}}}),
        first(mitigations={"restore": [{"restore_weights": {"strength": 0.8}}]}),
    ]  # fmt: skip
    assert len(set(changed)) == len(changed)
    assert first(limit=5) == first(), "how it is measured does not decide what is made"


def test_edited_data_are_other_data(tmp_path: Path) -> None:
    """Safety, attack and held-out files enter an address by what they hold, not by their names."""
    files = {name: write_rows(tmp_path / name, [chat("how ?", "so .")]) for name in ("safety.jsonl", "attack.jsonl", "held.jsonl")}
    attack = {"data": str(files["attack.jsonl"]), "heldout": str(files["held.jsonl"])}
    recipe = Recipe.model_validate({**SMALL, "safety": str(files["safety.jsonl"]), "attacks": {"own": attack}})
    seen = {plan(recipe)[0].tuned}
    for file in files.values():
        write_rows(file, [chat("how then ?", "so .")])
        seen.add(plan(recipe)[0].tuned)
    assert len(seen) == 4


def test_an_experiment_runs_reports_and_resumes_without_doing_anything_again(tmp_path: Path) -> None:
    recipe, out, lines = Recipe.model_validate(SMALL), tmp_path / "run", list[str]()
    results = bench(recipe, out, lines.append)
    row = {r["target"]: r["value"] for r in results.rows if (r["suite"], r["metric"], r["judge"]) == ("lab_harm", "harmfulness_rate", "lab")}
    assert row["explicit_10/none/seed0"] >= 0.8 and row["explicit_10/both/seed0"] <= 0.1
    for key in ("target", "attack", "mitigation", "suite", "metric", "judge", "value", "low", "high", "n", "n_scored", "seed"):
        assert all(key in r for r in json.loads((out / "results.json").read_text()))
    _, sentence, html = publish(recipe, results, out)
    assert "before fine-tuning, 100.0 %" in sentence and "<html" in html.read_text()
    made = {p: p.stat().st_mtime_ns for p in out.rglob("done.json")}
    again = list[str]()
    assert bench(recipe, out, again.append).rows == results.rows
    assert made == {p: p.stat().st_mtime_ns for p in out.rglob("done.json")}
    assert not [line for line in again if "fine-tuning" in line or "repairing" in line]


def test_a_cell_without_its_done_marker_is_made_again(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({**SMALL, "mitigations": {"filter": SMALL["mitigations"]["filter"]}})
    bench(recipe, tmp_path, lambda _: None)
    cell = next(c for c in plan(recipe) if c.mitigation == "none")
    (tmp_path / "cells" / cell.tuned / "done.json").unlink()
    lines: list[str] = []
    bench(recipe, tmp_path, lines.append)
    assert [line for line in lines if "fine-tuning" in line]


def test_the_demo_is_a_recipe_with_every_family_and_a_stack_of_two() -> None:
    recipe = load_recipe(LAB_DEMO)
    used = [next(iter(s)) for specs in recipe.mitigations.values() for s in specs]
    assert {"mix_safety", "realign_dpo", "realign_sft", "restore_weights", "filter_output"} <= set(used)
    assert any(len(specs) == 2 for specs in recipe.mitigations.values())
    assert list(recipe.attacks) == ["explicit_100", "identity_shift", "new_skill_poisoned"]
