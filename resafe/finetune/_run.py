"""What training and repairing share: the Run, its checks, the repair chain and the manifest."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from resafe import manifest, models
from resafe.errors import ResafeError
from resafe.files import digest, file_digest, write_json
from resafe.mitigation import Run
from resafe.mitigations import Named
from resafe.safety import SafetyRows, load_safety
from resafe.usage import added, measured

Specs = Sequence[str | Mapping[str, Any]]
Log = Callable[[str], None]

def safety_for(named: Sequence[Named], source: str | None) -> SafetyRows | None:
    """The safety rows, loaded only if some mitigation needs them."""
    return load_safety(source) if any(m.mitigation.needs.safety for m in named) else None


def repairs(named: Sequence[Named]) -> list[Named]:
    """The mitigations that act on the finished checkpoint, in order."""
    return [m for m in named if "repair" in m.mitigation.hooks()]


def chain(run: Run, named: Sequence[Named], tuned: Path, workdir: Path) -> Path:
    """Apply every repair in order; a finished link of an interrupted chain is used again. Returns the last folder."""
    for i, m in enumerate(repairs(named)):
        output = workdir / f"repair-{i}-{m.name}"
        if not output.is_dir():
            run.log(f"{m.name}: repairing")
            part = workdir / f".part-{output.name}"
            shutil.rmtree(part, ignore_errors=True)
            run.tuned, run.output = tuned, part
            os.replace(m.mitigation.repair(run), output)
        tuned = output
    return tuned


def guard_entry(run: Run, named: Sequence[Named], before: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The manifest's guard: this run's, else the one recorded `before`. A guard that cannot be loaded fails here."""
    made = [m.mitigation.guard(run) for m in named if "guard" in m.mitigation.hooks()]
    entries = [g.entry for g in made if g is not None]
    if len(entries) > 1:
        raise ResafeError("a checkpoint is served behind one guard; name one mitigation that guards.")
    return entries[0] if entries else before


def describe(named: Sequence[Named], safety: SafetyRows | None, seed: int) -> dict[str, Any]:
    """The part of the manifest that training and repairing share."""
    return {
        "mitigations": [m.spec for m in named],
        "seed": seed,
        "safety": {"source": safety.source, "sha256": safety.sha256} if safety else None,
    }


def link_copy(source: Path, target: Path, ours: bool = True) -> None:
    """Copy a checkpoint folder; weights by hard link where it is `ours`, a stage that nobody else writes to, and the file system allows it.

    Of a folder that is not `ours`, what belongs to the model: neither optimiser states nor code. Its weights are copied, since
    whoever trains it further writes into the same files.
    """
    from resafe.weights.writer import copy_beside

    target.mkdir(parents=True, exist_ok=True)
    copy_beside(source, target)
    for file in source.iterdir() if ours else [*source.glob("*.safetensors"), *source.glob("*.safetensors.index.json")]:
        if not file.is_file() or file.name == manifest.NAME or (target / file.name).exists():
            continue
        if file.suffix != ".safetensors" or not ours or not _linked(file.resolve(), target / file.name):
            shutil.copy2(file, target / file.name)
    if not ours and models.is_adapter(source):
        config = models.read_config(source / "adapter_config.json")
        write_json(target / "adapter_config.json", {**config, "base_model_name_or_path": str(models.base_of(source).absolute())})


def content(file: str | Path | None) -> str | None:
    """What a data file holds, as a hash."""
    return file_digest(Path(file)) if file else None


def state(folder: Path | None) -> list[Any] | None:
    """A model folder as it is now, an adapter's base with it: its path, and which files there are, unread. A retrained model differs."""
    if folder is None:
        return None
    files = [(f.name, f.stat()) for f in sorted(folder.iterdir()) if f.is_file()]
    found: list[Any] = [str(folder), [[name, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for name, s in files]]
    return [*found, state(models.base_of(folder))] if models.is_adapter(folder) else found


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


@contextmanager
def spending(work: Path) -> Iterator[dict[str, float]]:
    """Measure a block (resafe.usage) into the mapping, with what an interrupted run had spent on the same work.

    The block has `work` for itself. Raises ResafeError where another process is at it.
    """
    note, total = work / "usage.json", dict[str, float]()
    with _alone(work):
        before = models.read_config(note) if note.is_file() else {}
        try:
            with measured() as usage:
                yield total
        finally:
            total |= added(before, asdict(usage))
            if any(work.iterdir()):
                write_json(note, total)
            else:
                work.rmdir()  # nothing was finished that a later run could go on from


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    work.mkdir(parents=True, exist_ok=True)
    held = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResafeError(f"another run is at work on the same output (in {work}): wait for it, or name another output.") from None
        yield
    finally:
        os.close(held)


def workplace(output: Path, identity: Any) -> Path:
    """A hidden neighbour of `output` where an interrupted run finds what it had finished."""
    return output.parent / f".{output.name}.work-{digest([version('resafe'), identity])[:12]}"


def clear(output: Path) -> None:
    """Once `output` is whole, remove every workplace of it: this run's, and those of interrupted runs with other settings."""
    for work in output.parent.glob(f"{glob.escape(f'.{output.name}.work-')}*"):
        shutil.rmtree(work, ignore_errors=True)
