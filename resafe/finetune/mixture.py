"""The one way from the user's rows to the mixture: files, trainers, `resafe train` and recipes all come through here.

The same rows, safety rows, seed and parameters give the same mixture and the same hash, wherever it is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from resafe.errors import ResafeError
from resafe.files import digest
from resafe.mitigation import Run
from resafe.mitigations import Named, make
from resafe.rows import Row

INDEX = "_resafe_index"  # marks the user's own rows on their way through the data hooks


@dataclass(frozen=True)
class Mixture:
    """What is trained on, in order: indexes of the user's rows that are left as they are, and new or rewritten rows."""

    entries: list[int | Row]
    before: int  # rows of the user
    sha256: str

    @property
    def after(self) -> int:
        """Rows of the mixture."""
        return len(self.entries)

    @property
    def added(self) -> list[Row]:
        """The rows that are not the user's, in order."""
        return [e for e in self.entries if not isinstance(e, int)]

    @property
    def facts(self) -> dict[str, Any]:
        """What manifests and receipts hold."""
        return {"rows": self.after, "rows_before": self.before, "added": len(self.added), "sha256": self.sha256}

    def rows(self, own: Sequence[Row]) -> list[Row]:
        """The mixture as rows, the user's taken from `own`."""
        return [own[e] if isinstance(e, int) else e for e in self.entries]


def mix(named: Sequence[Named], run: Run, rows: Sequence[Row]) -> Mixture:
    """Apply every data hook in order. Raises ResafeError when there are no rows, before or after."""
    if not rows:
        raise ResafeError("there are no rows to train on, so there is nothing to mix into.")
    mixed: list[Row] = [{**row, INDEX: i} for i, row in enumerate(rows)]
    for m in named:
        mixed = m.mitigation.data(run, mixed)
    if not mixed:
        raise ResafeError(f"no row is left to train on after {', '.join(m.name for m in named)}.")
    entries = [_entry(row, rows) for row in mixed]
    return Mixture(entries, len(rows), rows_digest(rows[e] if isinstance(e, int) else e for e in entries))


def mix_unread(named: Sequence[Named], run: Run, n: int, about: Any = None) -> Mixture:
    """The mixture for `n` rows that cannot be looked at (a stream, or documents packed without marks), in their own order.

    `about` is what is known of them and enters the hash. Raises ResafeError for a mitigation that must see the rows.
    """
    for m in named:
        if "data" in m.mitigation.hooks() and not m.mitigation.needs.stream:
            raise ResafeError(
                f"{m.name} must see every row, which a stream or wrapped packing does not allow: use a map-style data set without it, or "
                "mix the file (resafe mix)."
            )
    virtual: list[Row] = [{INDEX: i} for i in range(n)]
    for m in named:
        virtual = m.mitigation.data(run, virtual)
    order = iter(range(n))
    entries: list[int | Row] = [next(order) if INDEX in row else row for row in virtual]
    places = [i for i, e in enumerate(entries) if not isinstance(e, int)]
    return Mixture(entries, n, digest(["unread", n, about, places, rows_digest(e for e in entries if not isinstance(e, int))]))


def _entry(row: Row, own: Sequence[Row]) -> int | Row:
    """The index of an untouched row of the user; else the row itself."""
    index = row.get(INDEX)
    if index is None:
        return row
    row = {k: v for k, v in row.items() if k != INDEX}
    return index if _content(row) == _content(own[index]) else row


def _content(row: Row) -> list[Any]:
    return [[[m["role"], m["content"]] for m in row["messages"]], row.get("rejected")]


def rows_digest(rows: Iterable[Row]) -> str:
    """sha256 of the conversations in order, row by row, whatever else the rows carry."""
    h = hashlib.sha256()
    for row in rows:
        h.update(digest(_content(row)).encode())
    return h.hexdigest()


def with_mode(specs: Sequence[Any], mode: str | None) -> list[Named]:
    """Validated mitigations; `mode` (append, replace) goes to mix_safety where its own parameters do not say.

    Raises ResafeError if a mode is given and nothing mixes.
    """
    from resafe.mitigations import stack

    named = stack(specs)
    if mode is None:
        return named
    if "mix_safety" not in {m.name for m in named}:
        raise ResafeError("--mix-mode is for mix_safety, which is not among the mitigations.")
    return [_moded(m, mode) for m in named]


def _moded(m: Named, mode: str) -> Named:
    if m.name != "mix_safety":
        return m
    if "mode" in m.mitigation.model_fields_set and m.spec["mode"] != mode:
        raise ResafeError(f"mix_safety is given mode={m.spec['mode']} and --mix-mode {mode}: keep one.")
    given = {k: v for k, v in m.spec.items() if k in m.mitigation.model_fields_set}
    return replace(m, mitigation=make({"name": m.name, **given, "mode": mode}).mitigation)
