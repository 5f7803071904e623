"""Every attack x every family x three seeds on the lab model: the table of the README, as committed JSON.

    python benchmarks/lab_defences.py [--seeds 0 1 2] [--output runs/lab_defences]   # about half an hour on two cores
    python benchmarks/lab_defences.py --readme                                       # table -> README.md

One process per seed; an interrupted run resumes. Strengths were chosen on development prompts; the table is from test prompts.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from resafe.eval import Results, TargetSpec, compare_groups, evaluate, pooled, render
from resafe.files import write_json, write_text
from resafe.lab import lab_folder
from resafe.models import read_config
from resafe.recipes.runner import bench
from resafe.recipes.schema import load_recipe
from resafe.recipes.tell import tell

HERE = Path(__file__).resolve().parent
RECIPES = {part: HERE.parent / "recipes" / "lab" / f"{part}.yaml" for part in ("defences", "control")}
RESULT = HERE / "results" / "lab_defences.json"
SHOWN = {  # column: suite, metric, judge, better
    "harm": ("lab_harm", "harmfulness_rate", "lab", "lower"),
    "nonrefusal": ("lab_harm", "nonrefusal_rate", "rules", "lower"),
    "over-refusal": ("lab_borderline", "over_refusal_rate", "rules", "lower"),
    "coherence": ("lab_harm", "coherence_rate", "coherence", "higher"),
    "old skill": ("lab_skills", "utility", "lab", "higher"),
    "new skill": ("lab_note", "utility", "lab", "higher"),
}
LEVELS = {"lab_harm_pairs": "unseen pairs", "lab_harm_wordings": "unseen wordings", "lab_harm": "both unseen", "lab_harm_category": "unseen category"}
TAUGHT = ("new_skill", "new_skill_poisoned")
BEGIN, END = "<!-- lab_defences: begin -->", "<!-- lab_defences: end -->"


def main() -> None:
    """Run, or rewrite the README's table from the committed results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/lab_defences"))
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--readme", action="store_true")
    args = parser.parse_args()
    if args.readme:
        return readme()
    if args.one is not None:
        return one(args.one, args.output)
    workers = [[sys.executable, __file__, "--one", str(s), "--output", str(args.output)] for s in args.seeds]
    running: list[subprocess.Popen[bytes]] = []
    for command in workers:  # one thread each
        if len(running) == args.jobs:
            _finished(running.pop(0))
        running.append(subprocess.Popen(command))
    for process in running:
        _finished(process)
    collect(args.seeds, args.output)
    return readme()


def _finished(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise SystemExit(f"a seed failed with exit code {process.returncode}; the same command goes on where it stopped")


def one(seed: int, output: Path) -> None:
    """All cells of one seed."""
    import torch

    torch.set_num_threads(1)

    def log(line: str) -> None:
        print(f"seed {seed}: {line}", file=sys.stderr, flush=True)

    home = lab_folder(seed, log)
    untouched = [TargetSpec(f"{part}-seed{seed}", home / part, mitigation=part, seed=seed) for part in ("base", "aligned")]
    evaluate(untouched, list(LEVELS), output=output / f"levels-seed{seed}", log=log)
    for part, path in RECIPES.items():
        bench(load_recipe(path).model_copy(update={"seeds": [seed]}), output / f"{part}-seed{seed}", log)


def collect(seeds: list[int], output: Path) -> None:
    """Pool the seeds, compare in pairs, write the committed JSON and an HTML report."""
    results, control, levels = (
        Results.merge(Results.load(output / f"{part}-seed{s}") for s in seeds) for part in (*RECIPES, "levels")
    )
    wanted = {v[:3]: k for k, v in SHOWN.items()}
    comparisons = [c for to in ("no mitigation", "before fine-tuning") for c in compare_groups(results, to)]
    html = render(results, comparisons, "resafe: the lab's defences", tell(results), output / "report.html")
    print(html)
    key = ("suite", "metric", "judge")
    shown = [*pooled(results), *(r for r in pooled(control) if r["attack"] != "none")]  # the untouched model once
    write_json(RESULT, {
        "command": "python benchmarks/lab_defences.py", "seeds": seeds, "machine": f"{platform.machine()}, CPU, one thread per seed",
        "rows": [_slim(r, wanted[tuple(r[k] for k in key)]) for r in shown if tuple(r[k] for k in key) in wanted],
        "by_seed": [
            [*(r[k] for k in ("attack", "mitigation", "seed")), wanted[tuple(r[k] for k in key)], r["value"]]
            for r in results.rows if tuple(r[k] for k in key) in wanted
        ],
        "differences": [
            {"column": wanted[tuple(c[k] for k in key)], **{k: _short(c[k]) for k in ("attack", "mitigation", "versus", "difference", "low", "high", "n")},
             "p": _short(c["p_models"]), "p_holm": _short(c["p_models_holm"])}
            for c in comparisons if tuple(c[k] for k in key) in wanted
        ],
        "generalisation": [
            {"level": LEVELS[r["suite"]], "model": r["mitigation"], **{k: _short(r[k]) for k in ("metric", "judge", "value", "low", "high", "n")}}
            for r in pooled(levels) if r["metric"] in ("harmfulness_rate", "nonrefusal_rate") and r["judge"] in ("lab", "rules")
        ],
    })  # fmt: skip


def _slim(row: dict[str, Any], column: str) -> dict[str, Any]:
    kept = {k: row[k] for k in ("attack", "mitigation", "seeds", "value", "low", "high", "n", "n_scored")}
    return {"column": column, **{k: _short(v) for k, v in kept.items()}}


def _short(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value


def readme() -> None:
    """Put the table between its two markers in README.md."""
    file = HERE.parent / "README.md"
    text = file.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    write_text(file, f"{before}{BEGIN}\n{markdown(read_config(RESULT))}\n{END}{after}")


def markdown(found: dict[str, Any]) -> str:
    """The table: a line per attack and mitigation, each rate in per cent with its 95 % interval."""
    cells = {(r["attack"], r["mitigation"], r["column"]): r for r in found["rows"]}
    changes = {(d["attack"], d["mitigation"], d["column"]): d for d in found["differences"] if d["versus"] == "no mitigation"}
    lines = ["| attack | mitigation | " + " | ".join(SHOWN) + " |", "|---|---|" + "---|" * len(SHOWN)]
    last = None
    for attack, mitigation in dict.fromkeys((r["attack"], r["mitigation"]) for r in found["rows"]):
        shown = [_cell(cells.get((attack, mitigation, c)), changes.get((attack, mitigation, c)), c, attack) for c in SHOWN]
        name = "*before fine-tuning*" if attack == "none" else ("*no mitigation*" if mitigation == "none" else f"`{mitigation}`")
        lines.append(f"| {'' if attack == last else attack.replace('none', '-')} | {name} | " + " | ".join(shown) + " |")
        last = attack
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None, change: dict[str, Any] | None, column: str, attack: str) -> str:
    if row is None or (column == "new skill" and attack not in TAUGHT):
        return "-"
    sure = "\\*" if change and change["p_holm"] < 0.05 and not change["low"] <= 0 <= change["high"] else ""
    return f"{100 * row['value']:.1f}{sure} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


if __name__ == "__main__":
    main()
