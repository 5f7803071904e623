"""Files and folders that appear complete or not at all, and the hashes that name them."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resafe.errors import ResafeError


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    h = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()


def write_text(path: Path, text: str, mode: int | None = None) -> Path:
    """Write `text` to `path` through a temporary neighbour, flush it to disk, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(tmp, 0o644 if mode is None else mode)
        os.replace(tmp, path)
        _sync(path.parent)
    except BaseException:
        Path(tmp).unlink(missing_ok=True)
        raise
    return path


def _sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk: a rename outlives a power cut only with its folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, value: Any) -> Path:
    """`write_text` for a JSON document (two-space indent, final newline)."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block succeeds and vanishes when it does not.

    What killed runs left of the same target is removed first. Raises ResafeError before any work if `target` exists and is not empty (unless `overwrite`).
    """
    check_free(target, overwrite)
    target = target.resolve()  # a link to an empty folder stays one
    with _held(target, "partial") as tmp:
        tmp.chmod(0o755)
        yield tmp
        for path in (*tmp.rglob("*"), tmp):
            if path.is_file() or path.is_dir():
                _sync(path)
        check_free(target, overwrite)  # again: something may have appeared meanwhile
        if target.exists():
            shutil.rmtree(target)
        os.replace(tmp, target)
        _sync(target.parent)


@contextmanager
def scratch(near: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder beside `near` for as long as the block runs. What killed runs left of the same name is removed first."""
    with _held(near.absolute(), name) as folder:
        yield folder


@contextmanager
def _held(target: Path, name: str) -> Iterator[Path]:
    """A hidden folder beside `target` that this process holds a lock on; it is gone afterwards, unless it was moved."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.{name}-"
    _sweep(target.parent, prefix)
    tmp = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
    held = os.open(tmp, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield tmp
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        os.close(held)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove the folders of that name that no living process holds: their lock went with the process."""
    for left in parent.glob(f"{glob.escape(prefix)}*"):
        fd = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # another run is writing there
        else:
            shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(fd)


def check_free(target: Path, overwrite: bool = False) -> None:
    """Refuse an output folder that already holds something, or that cannot be put in place as a whole."""
    if target.is_symlink() and not target.exists():
        raise ResafeError(f"output {target} is a link to {os.readlink(target)}, which does not exist: make that folder, or remove the link.")
    if target.is_mount():
        raise ResafeError(f"output {target} is a mount point, which a finished folder cannot replace: name a folder inside it.")
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise ResafeError(f"output {target} exists already: name another folder, or remove it first.")


def check_absent(file: Path) -> None:
    """Refuse an output file that exists already."""
    if file.exists():
        raise ResafeError(f"output {file} exists already: name another file, or remove it first.")
