"""Receipts of a watched run, and the verdict over them: was the mitigation applied, everywhere, and was a model saved?"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resafe.errors import ResafeError

Receipt = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What the receipts prove. `problem` is None when the mitigation was applied and a model was saved."""

    problem: str | None
    applied: list[Receipt] = field(default_factory=list)  # one a training, from its first rank
    saved: list[Path] = field(default_factory=list)  # folders that still exist, in the order of their first saving
    sharded: list[Path] = field(default_factory=list)  # those of them that hold FSDP shards only


def read(folder: Path) -> list[Receipt]:
    """All receipts, by time. A line that a dying process cut short is skipped: it proves nothing.

    Raises ResafeError if there is no such folder.
    """
    if not folder.is_dir():
        raise ResafeError(f"no such receipts folder: {folder}")
    found = []
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").split("\n"):
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and "event" in entry:
                found.append(entry)
    return sorted(found, key=lambda r: r["time"])


def judge(receipts: Sequence[Receipt]) -> Verdict:
    """The verdict over the receipts of one run."""
    by: dict[str, list[Receipt]] = defaultdict(list)
    for r in receipts:
        by[r["event"]].append(r)
    trainings = _trainings(by["applied"])
    last = [t for t in trainings if not _superseded(t, trainings)]
    first = [min(t, key=lambda r: r["rank"]) for t in last]
    folders = list(dict.fromkeys(Path(r["folder"]) for r in by["saved"]))
    saved = [f for f in folders if _holds_weights(f)]
    sharded = [f for f in folders if f not in saved and _shards(f)]
    problem = _never_applied(by) or next((p for t in last if (p := _incomplete(t, by["finished"]))), None)
    if problem is None and not saved and not sharded:
        problem = "training finished, but no saved model was seen: nothing to record the mitigation beside (does the command save one?)"
    return Verdict(problem, first, saved, sharded)


def _never_applied(by: dict[str, list[Receipt]]) -> str | None:
    if by["failed"]:
        return str(by["failed"][0]["reason"])
    if by["applied"]:
        return None
    if by["patched"]:
        return "transformers.Trainer was imported, but no Trainer.train() was called below the command"
    if by["bootstrap"]:
        return "transformers.Trainer was never imported by a watched process: another training library, or a process that was started with another PYTHONPATH"
    return "no watched Python process was started: python -E, -I or -S, a PYTHONPATH that the command sets anew, or no Python at all"


def _trainings(applied: Sequence[Receipt]) -> list[list[Receipt]]:
    """Receipts of the same `Trainer.train()` call over all its ranks; a rank that comes again belongs to another launch."""
    groups: dict[Any, list[list[Receipt]]] = defaultdict(lambda: [[]])
    for r in applied:  # by time
        if r["world"] == 1:
            key: Any = (r["host"], r["pid"], r["call"])
        else:  # ranks of one node have one parent; over several nodes only the rendezvous is common
            key = (r["group"], r["attempt"], r["call"], r["world"], r["ppid"] if r["local_world"] == r["world"] else None)
        if r["rank"] in {other["rank"] for other in groups[key][-1]}:
            groups[key].append([])
        groups[key][-1].append(r)
    return [training for launches in groups.values() for training in launches]


def _superseded(training: Sequence[Receipt], all_: Sequence[Sequence[Receipt]]) -> bool:
    """Whether a launcher started the same training again after a worker had died (torchrun --max-restarts)."""
    here, agents = training[0], {(r["host"], r["ppid"]) for r in training}
    return here["world"] > 1 and any(
        t[0]["world"] == here["world"] and t[0]["group"] == here["group"] and int(t[0]["attempt"]) > int(here["attempt"])
        and agents & {(r["host"], r["ppid"]) for r in t}
        for t in all_
    )  # fmt: skip


def _incomplete(training: Sequence[Receipt], finished: Sequence[Receipt]) -> str | None:
    """Why one training does not count, if it does not."""
    world = training[0]["world"]
    ranks = {r["rank"] for r in training}
    if missing := sorted(set(range(world)) - ranks):
        return f"rank {', '.join(map(str, missing))} of {world} never applied it"
    if len({r["sha256"] for r in training}) > 1:
        return "the ranks do not agree on the mixture: " + ", ".join(f"rank {r['rank']} has {str(r['sha256'])[:12]}" for r in training)
    done = {(f["host"], f["pid"], f["call"]): f for f in finished}
    for r in training:
        end = done.get((r["host"], r["pid"], r["call"]))
        if end is None:
            return f"rank {r['rank']} of {world} never finished training"
        if not end["steps"]:
            return f"training took 0 steps on {r['rows']} rows"
    return None


def _holds_weights(folder: Path) -> bool:
    """Whether whole weights (or an adapter's) lie in a folder."""
    return any(f.stat().st_size > 0 for pattern in ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin") for f in folder.glob(pattern) if f.is_file())


def _shards(folder: Path) -> Path | None:
    """The folder of FSDP shards in a checkpoint, if it holds one."""
    return next((p for p in sorted(folder.glob("pytorch_model_fsdp*")) if p.is_dir()), None)


def merge_command(folder: Path) -> str:
    """What turns FSDP shards into weights that can be loaded."""
    return f"accelerate merge-weights {_shards(folder)} {folder}"
