"""Records that survive being killed: append-only files of (address, value), each with its length and checksum.

A record is one line: length of the body, a space, its checksum (BLAKE2b, 8 bytes, hex), a space, the body as JSON. Whatever
does not add up is not there: a torn last line is cut off by the next writer, a damaged one in the middle is skipped. Values may
hold harmful text, so files are readable by their owner only.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resafe.errors import ResafeError
from resafe.files import digest


class Log:
    """One file of records. Several processes may append to it; each knows what was there when it opened the file.

    `damaged` counts lines that were skipped. A later record of an address replaces an earlier one.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.damaged = path, 0
        self._where: dict[str, tuple[int, int]] = {}  # address -> offset and length of the body
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise ResafeError(f"the store {path} cannot be opened ({error.strerror}): name another with --store, or 'none'.") from None
        self._index()

    def _index(self) -> None:
        offset = 0
        with open(self.path, "rb") as f:
            for line in f:
                if (body := _body(line)) is not None:
                    self._where[str(json.loads(body)[0])] = (offset + len(line) - 1 - len(body), len(body))
                else:
                    self.damaged += 1
                offset += len(line)

    def get(self, address: str) -> Any:
        """The value at `address`, or None."""
        if address not in self._where:
            return None
        offset, length = self._where[address]
        return json.loads(os.pread(self._fd, length, offset))[1]

    def put(self, address: str, value: Any) -> None:
        """Append a record in one write; it is there once this returns, whatever happens to the process."""
        body = json.dumps([address, value], ensure_ascii=True, separators=(",", ":")).encode()
        line = b"%d %s %s\n" % (len(body), _checksum(body), body)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            end = self._whole_end()
            self._append(line, end)
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._where[address] = (end + len(line) - 1 - len(body), len(body))

    def _append(self, line: bytes, end: int) -> None:
        """Write all of `line`, or nothing of it. Raises ResafeError where the disk does not take it."""
        try:
            done = 0
            while done < len(line):
                done += os.write(self._fd, line[done:])
        except OSError as error:
            os.ftruncate(self._fd, end)
            raise ResafeError(f"the store {self.path} cannot be written ({error.strerror}): make room, or name another with --store.") from None

    def _whole_end(self) -> int:
        """The end of the file, after cutting off the line that a killed writer left unfinished."""
        end = os.fstat(self._fd).st_size
        if end and os.pread(self._fd, 1, end - 1) != b"\n":
            while end and os.pread(self._fd, 1, end - 1) != b"\n":
                end -= 1
            os.ftruncate(self._fd, end)
        return end

    def __contains__(self, address: str) -> bool:
        return address in self._where

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def close(self) -> None:
        """Flush to disk and close."""
        if self._fd >= 0:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Store:
    """A folder of logs, one for each kind of record and identity of whatever made them."""

    def __init__(self, root: Path) -> None:
        """Raises ResafeError where no folder can be made."""
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ResafeError(f"the store {root} cannot be made ({error.strerror}): name another with --store, or 'none'.") from None
        self._logs: dict[Path, Log] = {}

    def log(self, kind: str, identity: Any) -> Log:
        """The log of `identity` (JSON-able); another identity has another file, so that neither sees the other's records."""
        path = self._path(kind, identity)
        if path not in self._logs:
            self._logs[path] = Log(path)
            if "about" not in self._logs[path]:
                self._logs[path].put("about", identity)
        return self._logs[path]

    def forget_run(self, run: str) -> None:
        """Remove what is kept for one run only: logs whose identity is a list that ends in its name."""
        for path in self.root.glob("*/*.log"):
            with Log(path) as log:
                about = log.get("about")
            if isinstance(about, list) and about and about[-1] == run:
                if known := self._logs.pop(path, None):
                    known.close()
                path.unlink(missing_ok=True)

    def _path(self, kind: str, identity: Any) -> Path:
        return self.root / kind / f"{digest(identity)[:32]}.log"

    def close(self) -> None:
        """Flush and close all logs; they can be opened again."""
        while self._logs:
            self._logs.popitem()[1].close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=8).hexdigest().encode()


def _body(line: bytes) -> bytes | None:
    """The body of a whole record; None for anything else."""
    length, _, rest = line.partition(b" ")
    checksum, _, body = rest.partition(b" ")
    if not line.endswith(b"\n") or not length.isdigit():
        return None
    body = body[:-1]
    return body if len(body) == int(length) and _checksum(body) == checksum else None
