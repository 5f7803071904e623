"""Rows of a data set as plain dicts, read as they are asked for: tokens of a large data set never stand in memory as Python lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from resafe.errors import ResafeError

Example = dict[str, Any]
SAMPLE = 1000  # rows from which masks and layouts are read
BATCH = 1000


class Examples(Sequence[Example]):
    """A `datasets.Dataset`, a torch data set of mappings, or a list of rows."""

    def __init__(self, source: Any) -> None:
        from datasets import Dataset

        self.arrow = isinstance(source, Dataset)
        self.source = source.with_format(None) if self.arrow else source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        return [plain(self.source[i]) for i in range(len(self))[index]] if isinstance(index, slice) else plain(self.source[index])

    def __iter__(self) -> Iterator[Example]:
        if not self.arrow:
            yield from (plain(self.source[i]) for i in range(len(self)))
            return
        for batch in self.source.iter(batch_size=BATCH):
            yield from ({k: v[i] for k, v in batch.items()} for i in range(len(next(iter(batch.values())))))

    def select(self, columns: Sequence[str]) -> Examples:
        """The same rows with some of their columns only."""
        return Examples(self.source.select_columns(list(columns))) if self.arrow else self

    @cached_property
    def sample(self) -> list[Example]:
        """The first rows."""
        return list(self[:SAMPLE])

    @cached_property
    def widths(self) -> list[int]:
        """Tokens of every row."""
        if not self.arrow:
            return [len(e["input_ids"]) for e in self]
        import pyarrow.compute as pc

        tables = self.source.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=BATCH)
        return [n for table in tables for n in pc.list_value_length(table["input_ids"]).to_pylist()]


def plain(example: Any) -> Example:
    """A row as a dict of lists and scalars. Raises ResafeError for a row that is no mapping."""
    if not isinstance(example, Mapping):
        raise ResafeError(f"a training row is a {type(example).__name__}, not a mapping of columns; mix the data file instead (resafe mix).")
    return {k: v.tolist() if callable(getattr(v, "tolist", None)) else v for k, v in example.items()}
