"""The harness's samples as votes: one suite per task, or per group of tasks (mmlu) whose tasks were all run.

Suite `lmeval:TASK`, of kind "utility"; a judge `lm_eval:METRIC` (`lm_eval:METRIC,FILTER` where answers were also read
in other ways) for each metric that is between 0 and 1 on every sample and better when higher. Yes or no where it is 1
or 0. Two runs can be paired where documents and prompts are the same, so not after another number of examples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resafe.errors import ResafeError
from resafe.eval.results import Items, Results
from resafe.files import digest

FILE = re.compile(r"samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl")
Sample = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """The votes on one task or group, and how they were made."""

    items: Items
    source: str


def add(results: Results, who: Mapping[str, Any], found: Mapping[str, Measured]) -> None:
    """Add what was measured on one target to `results`; `who` has target, attack, mitigation and seed."""
    for name, measured in found.items():
        results.add({**who, "suite": name}, "utility", measured.items)
        about = {"name": name, "kind": "utility", "n": len(measured.items.prompts), "source": measured.source}
        results.meta.setdefault("suites", {}).setdefault(name, {**about, "dropped": {}})


def import_results(path: Path, target: str, attack: str = "none", mitigation: str = "none") -> Results:
    """`import_samples` as the results of one target, to be merged with others."""
    results = Results(meta={"targets": {target: {}}, "judges": {}})
    add(results, {"target": target, "attack": attack, "mitigation": mitigation, "seed": None}, import_samples(path))
    return results


def import_samples(path: Path) -> dict[str, Measured]:
    """Suite name -> votes, from a folder that the harness wrote to (with `--log_samples`) or one of its samples files.

    Raises ResafeError when there are none, two runs of one task, or samples that are no rates.
    """
    files = _files(path)
    runs = {task: _described(file) for task, file in files.items()}
    found = {task: _measured(task, file, runs[task]) for task, file in files.items()}
    groups = {
        name: parts for about in runs.values() for name, parts in about.get("group_subtasks", {}).items() if parts
    }
    inner = {name for parts in groups.values() for name in parts}
    for group in [name for name in groups if name not in inner]:
        leaves = _leaves(group, groups)
        if leaves and all(leaf in found for leaf in leaves):
            found[group] = _joined({leaf: found.pop(leaf) for leaf in leaves})
    return {f"lmeval:{name}": measured for name, measured in found.items()}


def _files(path: Path) -> dict[str, Path]:
    """Task -> samples file."""
    paths = [path] if path.is_file() else sorted(path.rglob("samples_*.jsonl"))
    files: dict[str, Path] = {}
    for file in paths:
        if not (named := FILE.fullmatch(file.name)):
            raise ResafeError(f"{file} is not named as lm-evaluation-harness names samples: samples_TASK_DATE.jsonl.")
        if named["task"] in files:
            raise ResafeError(f"two runs of {named['task']}, {files[named['task']]} and {file}: name one of the files.")
        files[named["task"]] = file
    if not files:
        raise ResafeError(f"{path} holds no samples_*.jsonl of lm-evaluation-harness: run it with --log_samples.")
    return files


def _described(file: Path) -> dict[str, Any]:
    """The results file that was written beside a samples file; empty when it is gone."""
    named = FILE.fullmatch(file.name)
    beside = sorted(file.parent.glob(f"*_{named['date']}.json")) if named else []
    try:
        value = json.loads(beside[0].read_text(encoding="utf-8")) if beside else {}
    except ValueError as error:
        raise ResafeError(f"{beside[0]} is not valid JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _measured(task: str, file: Path, about: Mapping[str, Any]) -> Measured:
    by_filter: dict[str, dict[int, Sample]] = {}
    for sample in _samples(file):
        seen = by_filter.setdefault(str(sample.get("filter", "none")), {})
        if sample["doc_id"] in seen:
            raise ResafeError(f"{file} holds sample {sample['doc_id']} twice: run the task again into a new folder.")
        seen[sample["doc_id"]] = sample
    docs, *others = [dict(sorted(seen.items())) for seen in by_filter.values()]
    if any(other.keys() != docs.keys() for other in others):
        raise ResafeError(f"{file} holds other samples for one filter than for another: it is not complete.")
    items = Items(
        [str(i) for i in docs],
        [digest([s.get("doc_hash"), s.get("prompt_hash")])[:16] for s in docs.values()],
        [""] * len(docs),
        _columns(by_filter, list(docs), about.get("higher_is_better", {}).get(task, {})),
    )
    if not items.votes:
        names = ", ".join(next(iter(docs.values())).get("metrics", [])) or "none"
        raise ResafeError(f"{file}: no metric ({names}) is a rate between 0 and 1 on every sample, better when higher.")
    return Measured(items, _source(task, about))


def _source(task: str, about: Mapping[str, Any]) -> str:
    version, shots = (about.get(key, {}).get(task, "?") for key in ("versions", "n-shot"))
    return f"lm-evaluation-harness {about.get('lm_eval_version', '?')}, task version {version}, {shots}-shot"


def _samples(file: Path) -> Iterable[Sample]:
    rows = []
    with file.open("rb") as lines:
        for i, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ResafeError(f"{file}, line {i} is not JSON: {error}") from None
            if not isinstance(row, dict) or not isinstance(row.get("doc_id"), int):
                raise ResafeError(f"{file}, line {i} is not a sample of lm-evaluation-harness: it has no doc_id.")
            rows.append(row)
    if not rows:
        raise ResafeError(f"{file} holds no samples.")
    return rows


def _columns(
    by_filter: Mapping[str, Mapping[int, Sample]], docs: list[int], higher: Mapping[str, bool]
) -> dict[str, list[bool | float | None]]:
    """Votes for each filter and metric, by the documents in order."""
    columns: dict[str, list[bool | float | None]] = {}
    for reading, seen in by_filter.items():
        for metric in seen[docs[0]].get("metrics", []):
            votes = [_vote(seen[i].get(metric)) for i in docs]
            if None not in votes and higher.get(metric) is not False:
                judge = f"lm_eval:{metric}" if len(by_filter) == 1 else f"lm_eval:{metric},{reading}"
                columns[f"utility|{judge}"] = votes
    return columns


def _vote(value: Any) -> bool | float | None:
    """None: not a rate of one sample, such as a log-likelihood or a list."""
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
        return None
    return bool(value) if value in (0, 1) else float(value)


def _leaves(group: str, groups: Mapping[str, list[str]]) -> list[str]:
    return [leaf for part in groups[group] for leaf in (_leaves(part, groups) if part in groups else [part])]


def _joined(parts: Mapping[str, Measured]) -> Measured:
    """The tasks of a group as one, each a category; the metrics that all of them have."""
    items = {task: part.items for task, part in parts.items()}
    first = next(iter(items.values()))
    shared = [key for key in first.votes if all(key in part.votes for part in items.values())]
    if not shared:
        raise ResafeError(f"the tasks {', '.join(parts)} share no metric: name the tasks, not their group.")
    return Measured(
        Items(
            [f"{task}/{prompt}" for task, part in items.items() for prompt in part.prompts],
            [key for part in items.values() for key in part.keys],
            [task for task, part in items.items() for _ in part.prompts],
            {key: [vote for part in items.values() for vote in part.votes[key]] for key in shared},
        ),
        "; ".join(dict.fromkeys(part.source for part in parts.values())),
    )
