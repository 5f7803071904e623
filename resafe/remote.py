"""Models behind fsspec URLs (s3://, gs://, hf://, sftp:// ...): their files are copied into the cache once, then read as a local folder.

Only what a model needs is fetched: weights as safetensors, JSON, tokenizer and template files; no code and no pickle. The place
needs fsspec's own package for its protocol (s3fs, gcsfs, ...), which finds credentials in its usual places.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resafe.errors import ResafeError, first_line
from resafe.files import digest, write_json

SUFFIXES = frozenset([".safetensors", ".json", ".jinja", ".model", ".txt"])
RECORD = ".fetched"  # name -> what the remote file was when it was copied
# Of what a file system tells of a file: what says nothing of its content, or changes when it is read.
SAYS_NOTHING = frozenset(["name", "Key", "type", "StorageClass", "islink", "mode", "uid", "gid", "nlink", "time", "atime", "accessed", "last_accessed", "accessTime"])


def is_url(model: str) -> bool:
    """Whether a model argument is a URL and not a folder."""
    return re.match(r"[a-z][a-z0-9+.-]*://", model, re.IGNORECASE) is not None


def fetch(url: str, log: Callable[[str], None] = lambda _: None) -> Path:
    """The local copy of the model folder at `url`, brought up to date: files that changed there are copied again.

    A copy that was broken off goes on with the files that are missing. Raises ResafeError where the protocol is unknown or its
    package missing, and where the folder cannot be read, is empty or breaks off.
    """
    from resafe.fingerprint import cache_home

    try:
        system, there = _open(url)
        files = {Path(f["name"]).name: f for f in system.ls(there, detail=True) if f["type"] == "file" and Path(f["name"]).suffix in SUFFIXES}
    except Exception as error:  # every file system has errors of its own
        raise _failed(url, error) from None
    if not files:
        raise ResafeError(f"{shown(url)} holds no model: no safetensors or JSON files are there.")
    folder = cache_home() / "models" / f"{Path(there).name}-{digest(url)[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    with _alone(folder):
        record = _record(folder)
        for name in {p.name for p in folder.iterdir()} - files.keys() - {RECORD}:
            (folder / name).unlink()
        for name, info in files.items():
            told = {k: str(v) for k, v in sorted(info.items()) if k not in SAYS_NOTHING}
            version = digest(told) if told.keys() - {"size"} else None  # a size alone does not say whether a file has changed
            if version is None or record.get(name) != version or not (folder / name).is_file():
                log(f"fetching {name} ({(info.get('size') or 0) / 1e9:.2f} GB) from {shown(url)}")
                _copy(system, info, folder / name, url)
                record[name] = version or ""
                write_json(folder / RECORD, record)
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two commands that want the same model fetch it one after the other."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    system, there = fsspec.core.url_to_fs(url.rstrip("/"), use_listings_cache=False)
    return system, str(there)


def _copy(system: Any, info: dict[str, Any], target: Path, url: str) -> None:
    """One remote file to `target`, whole or not at all."""
    fd, part = tempfile.mkstemp(dir=target.parent, prefix=".part-")
    os.close(fd)
    try:
        system.get_file(info["name"], part)
        size = Path(part).stat().st_size
        if info.get("size") not in (None, size):
            raise ResafeError(f"{target.name} from {shown(url)} broke off at {size} of {info['size']} bytes: run the same command again.")
        os.replace(part, target)
    except ResafeError:
        raise
    except Exception as error:  # every file system has errors of its own
        raise _failed(url, error) from None
    finally:
        Path(part).unlink(missing_ok=True)


def _record(folder: Path) -> dict[str, str]:
    from resafe.models import read_config

    return read_config(folder / RECORD) if (folder / RECORD).is_file() else {}


def _failed(url: str, error: Exception) -> ResafeError:
    if isinstance(error, ImportError):
        return ResafeError(f"{shown(url)} cannot be read: {first_line(error)}")
    if isinstance(error, FileNotFoundError):
        return ResafeError(f"there is no folder at {shown(url)}.")
    return ResafeError(f"{shown(url)} cannot be read ({type(error).__name__}: {shown(first_line(error))}).")


def shown(text: str) -> str:
    """Text without the user names, passwords and queries (signatures, tokens) of the URLs in it."""
    return re.sub(r"(\w://)(?:\S*@)?([^\s?]*)(\?\S*)?", r"\1\2", text)
