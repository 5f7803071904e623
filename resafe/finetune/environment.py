"""The environment variables that carry a run into every process of the training command; they mirror the flags of `resafe run`."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.finetune.inject._resafe_start import RECEIPTS

if TYPE_CHECKING:
    from resafe.finetune.session import Settings
    from resafe.rows import Row

MITIGATION, SAFETY, MODE, SEED, PLAN, TASK = (
    "RESAFE_MITIGATION", "RESAFE_SAFETY_DATA", "RESAFE_MIX_MODE", "RESAFE_SEED", "RESAFE_PLAN", "RESAFE_KEEP_TASK_ROWS",
)  # fmt: skip
INJECT = Path(__file__).resolve().parent / "inject"
TASK_FILE = "task-rows.jsonl"


def variables(
    receipts: Path, mitigations: Sequence[str], safety_data: str | None, mix_mode: str | None, seed: int, plan: bool = False, task: bool = False
) -> dict[str, str]:
    """What to set for the training command, PYTHONPATH apart."""
    found = {RECEIPTS: str(receipts.absolute()), MITIGATION: shlex.join(mitigations), SEED: str(seed)}
    if safety_data:
        found[SAFETY] = placed(safety_data)
    if mix_mode:
        found[MODE] = mix_mode
    if plan:
        found[PLAN] = "1"
    if task:
        found[TASK] = "1"
    return found


def placed(safety_data: str) -> str:
    """A name, or a file's absolute path, which means the same in every working folder."""
    return str(Path(safety_data).absolute()) if Path(safety_data).exists() else safety_data


def mitigations_of(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The specs in RESAFE_MITIGATION: words as a shell would split them."""
    try:
        return shlex.split(environ.get(MITIGATION, ""))
    except ValueError as error:
        raise ResafeError(f"{MITIGATION} cannot be read ({error}): separate mitigations by spaces.") from None


def seed_of(environ: Mapping[str, str] = os.environ) -> int:
    """RESAFE_SEED, 0 where it is not set."""
    text = environ.get(SEED, "0")
    try:
        return int(text)
    except ValueError:
        raise ResafeError(f"{SEED}={text!r} is not a whole number.") from None


def settings() -> Settings:
    """The mitigations of this process, loaded and checked. Raises ResafeError for whatever is wrong with them."""
    from resafe.finetune import _run
    from resafe.finetune.mixture import with_mode
    from resafe.finetune.session import Settings
    from resafe.mitigation import Run

    named = with_mode(mitigations_of(), os.environ.get(MODE))
    safety = _run.safety_for(named, os.environ.get(SAFETY))
    guard = _run.guard_entry(Run(output=Path()), named) if first_process() else None  # only it writes manifests
    return Settings(named, safety, seed_of(), guard)


def first_process() -> bool:
    """Whether this is rank 0, or not distributed at all."""
    return os.environ.get("RANK", "0") == "0"


def watched() -> bool:
    """Whether this process runs below `resafe run` (or its exported environment)."""
    return bool(os.environ.get(RECEIPTS))


def planning() -> bool:
    """Whether this is `resafe plan`: report and stop before training."""
    return bool(os.environ.get(PLAN))


def wants_task_rows() -> bool:
    """Whether a repair after training wants the user's rows for replay."""
    return watched() and bool(os.environ.get(TASK))


def keep_task_rows(rows: Sequence[Row]) -> None:
    """Write the user's rows beside the receipts, those that are whole conversations."""
    from resafe.files import write_text
    from resafe.rows import normalise_row

    lines = []
    for row in rows:
        try:
            kept: dict[str, Any] = normalise_row({"messages": row["messages"]}, "row")
        except ResafeError:
            continue  # a shape that replay has no use for
        if all(m["content"].strip() for m in kept["messages"]):
            lines.append(json.dumps(kept, ensure_ascii=False) + "\n")
    if lines:
        write_text(Path(os.environ[RECEIPTS]) / TASK_FILE, "".join(lines), mode=0o600)


def with_inject(path: str | None) -> str:
    """PYTHONPATH with the start-up folder in front, once."""
    rest = _others(path)
    return os.pathsep.join([str(INJECT), *rest])


def without_inject(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment as it was before `resafe run`: for repairs and for whatever must not be watched."""
    ours = {RECEIPTS, MITIGATION, SAFETY, MODE, SEED, PLAN, TASK}
    found = {k: v for k, v in environ.items() if k not in ours}
    rest = _others(found.pop("PYTHONPATH", None))
    return {**found, **({"PYTHONPATH": os.pathsep.join(rest)} if rest else {})}


def _others(path: str | None) -> list[str]:
    """Entries of a PYTHONPATH other than ours; an empty one means the working folder and stays."""
    return [p for p in path.split(os.pathsep) if p != str(INJECT)] if path else []
