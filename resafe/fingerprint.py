"""Which model exactly: a hash over every byte of a folder's weights, configuration, tokenizer and chat template.

Hashing gigabytes takes a while, so the hash of a file is kept in the cache and used again as long as the file's inode,
size and times are what they were. Change one byte and the fingerprint is another.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from resafe.files import digest, file_digest, write_text

SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")  # .model, .txt: tokenizers of older models
OWN = ("resafe.json",)  # says what was done to a model; no part of it


def cache_home() -> Path:
    """Where resafe keeps what it can make again: $RESAFE_CACHE, else ~/.cache/resafe."""
    return Path(os.environ.get("RESAFE_CACHE") or Path.home() / ".cache" / "resafe")


def model_fingerprint(folder: str | Path) -> str:
    """sha256 (hex) over the files that decide what a model says; for an adapter, its base model's too."""
    from resafe.models import base_of, is_adapter

    home = Path(folder).resolve()
    kept = sorted(p for p in home.iterdir() if p.suffix in SUFFIXES and p.name not in OWN)
    sums = [[p.name, cached_digest(p)] for p in kept]
    return digest([sums, model_fingerprint(base_of(home)) if is_adapter(home) else None])


def cached_digest(file: Path) -> str:
    """sha256 (hex) of a file, from the cache if the file has not changed since."""
    file = file.resolve()
    s = file.stat()
    state = [str(file), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns]
    note = cache_home() / "hashes" / f"{digest(state)[:32]}.json"
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        if found["state"] == state:
            return str(found["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not whole: hash again
    value = file_digest(file)
    if s.st_size >= 1 << 16:  # small files are as quickly hashed as looked up
        write_text(note, json.dumps({"state": state, "sha256": value}))
    return value
