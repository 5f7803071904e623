"""How rows of a tokenised data set are laid out: one document each, padded to one length, or several documents packed.

Packed rows are taken apart, mixed as documents, and packed again in the same way.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resafe import chat
from resafe.finetune._examples import Example, Examples

BARE = {"input_ids", "labels", "attention_mask", "position_ids", "token_type_ids", "special_tokens_mask"}


class Layout:
    """One document a row, of any length."""

    rebuilds = False  # whether the user's rows are written anew

    @property
    def limit(self) -> int | None:
        """Tokens that a document may have in this layout, where it sets a limit."""
        return None

    def split(self, examples: Sequence[Example]) -> list[Example]:
        """The documents of the rows, in order; asked for only where the layout rebuilds."""
        return list(examples)

    def join(self, documents: Sequence[int | Example], own: Sequence[Example]) -> list[int | Example]:
        """Rows of the mixture: a user's document by its index in `own`, or a new one; what needs no change stays an index."""
        return list(documents)


Plain = Layout


@dataclass
class Padded(Layout):
    """Every row is padded to `length`, on the side and with the values that the user's rows show."""

    length: int
    left: bool
    fill: dict[str, Any]

    @property
    def limit(self) -> int:
        return self.length

    def join(self, documents: Sequence[int | Example], own: Sequence[Example]) -> list[int | Example]:
        return [d if isinstance(d, int) else self._padded(d) for d in documents]

    def _padded(self, example: Example) -> Example:
        def wide(column: str, values: Any) -> Any:
            if column not in self.fill or values is None:
                return values
            pad = [self.fill[column]] * (self.length - len(values))
            return (pad + values if self.left else values + pad)[: self.length]

        return {c: wide(c, v) for c, v in example.items()}


@dataclass
class Packed(Layout):
    """Several documents a row, their lengths in `seq_lengths`, none longer than `length` (TRL's best-fit packing)."""

    length: int
    columns: tuple[str, ...]  # token columns
    rebuilds = True

    @property
    def limit(self) -> int:
        return self.length

    def split(self, examples: Sequence[Example]) -> list[Example]:
        documents = []
        for example in examples:
            at = 0
            for n in example["seq_lengths"]:
                documents.append({c: example[c][at : at + n] for c in self.columns})
                at += n
        return documents

    def join(self, documents: Sequence[int | Example], own: Sequence[Example]) -> list[int | Example]:
        found = [own[d] if isinstance(d, int) else d for d in documents]
        found = [{c: d[c][: self.length] for c in self.columns} for d in found]
        rows: list[int | Example] = []
        for bin_ in first_fit([len(d["input_ids"]) for d in found], self.length):
            row: Example = {c: [v for i in bin_ for v in found[i][c]] for c in self.columns}
            rows.append({**row, "seq_lengths": [len(found[i]["input_ids"]) for i in bin_]})
        return rows


@dataclass
class Wrapped(Layout):
    """One stream of documents cut every `length` tokens (run_clm.py; TRL's `wrapped`): where documents end is not known.

    The user's rows stay as they are. Safety rows get rows of their own, filled up with more of the same.
    """

    length: int
    columns: tuple[str, ...]  # token columns
    documents: int  # of the user, estimated

    def join(self, documents: Sequence[int | Example], own: Sequence[Example]) -> list[int | Example]:
        """`documents` holds fewer indexes than there were when safety rows are to take the place of the user's."""
        added = [d for d in documents if not isinstance(d, int)]
        blocks: list[Example] = self._blocks(added) if added else []
        replace = sum(isinstance(d, int) for d in documents) < self.documents
        rng = random.Random(f"wrapped {len(own)} {len(blocks)}")
        kept = sorted(rng.sample(range(len(own)), len(own) - len(blocks) * replace))
        rows: list[int | Example] = list(kept)
        for block in blocks:
            rows.insert(rng.randrange(len(rows) + 1), block)
        return rows

    def _blocks(self, added: Sequence[Example]) -> list[Example]:
        stream: Example = {c: [v for d in added for v in d[c]] for c in self.columns}
        total = len(stream["input_ids"])
        if short := -total % self.length:
            stream = {c: [*v, *(v * (short // total + 1))[:short]] for c, v in stream.items()}
        blocks = [{c: v[a : a + self.length] for c, v in stream.items()} for a in range(0, total + short, self.length)]
        return [{**b, "position_ids": list(range(self.length))} if "position_ids" in b else b for b in blocks]


@dataclass
class Knapsack(Layout):
    """LLaMA-Factory's packing: several documents a row, told apart by `position_ids`, the rest padded; one width for all rows.

    With `packing_params` (neat packing) the attention mask numbers the documents from 1, padding being 0.
    """

    width: int
    pad: int
    parameters: dict[str, Any] | None
    others: tuple[str, ...]  # columns that are empty
    rebuilds = True

    @property
    def limit(self) -> int:
        return self.width - 1

    def split(self, examples: Sequence[Example]) -> list[Example]:
        documents = []
        for e in examples:
            starts = [i for i, p in enumerate(e["position_ids"]) if p == 0]
            for a, b in zip(starts, [*starts[1:], len(e["input_ids"])]):
                if e["input_ids"][a:b] != [self.pad] or e["labels"][a:b] != [-100]:  # a padding token is a document of its own
                    documents.append({c: e[c][a:b] for c in ("input_ids", "labels", "position_ids")})
        return documents

    def join(self, documents: Sequence[int | Example], own: Sequence[Example]) -> list[int | Example]:
        found = [own[d] if isinstance(d, int) else d for d in documents]
        size = self.width - 1  # one token of padding at least, as there
        return [self._row([found[i] for i in b], size) for b in first_fit([min(len(d["input_ids"]), size) for d in found], size)]

    def _row(self, documents: Sequence[Example], size: int) -> Example:
        ids = [d["input_ids"][:size] for d in documents]
        room = self.width - sum(map(len, ids))
        numbers = [n + 1 if self.parameters else 1 for n, part in enumerate(ids) for _ in part]
        row: Example = {
            "input_ids": [t for part in ids for t in part] + [self.pad] * room,
            "labels": [t for d in documents for t in d["labels"][:size]] + [-100] * room,
            "position_ids": [i for part in ids for i in range(len(part))] + [0] * room,
            "attention_mask": numbers + [0 if self.parameters else 1] * room, **dict.fromkeys(self.others),
        }  # fmt: skip
        if self.parameters:
            ends = list(itertools.accumulate([*map(len, ids), room]))
            row["packing_params"] = {**self.parameters, "sequence_boundaries": [0, *ends], "right_padding_length": room}
        return row


def first_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indexes in bins of at most `size`, longest first, each into the fullest bin that it fits (best-fit decreasing)."""
    from bisect import bisect_left, insort

    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, bin), sorted
    for i in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        at = bisect_left(room, (lengths[i], -1))
        if at == len(room):
            bins.append([])
            free, which = size, len(bins) - 1
        else:
            free, which = room.pop(at)
        bins[which].append(i)
        insort(room, (free - lengths[i], which))
    return bins


def layout_of(trainer: Any, examples: Examples, columns: Sequence[str], tokenizer: Any) -> Layout:
    """Read the layout off the rows."""
    widths, sample = examples.widths, examples.sample
    tokens = tuple(c for c in columns if all(isinstance(e[c], list) and len(e[c]) == n for e, n in zip(sample, widths)))
    size = getattr(trainer.args, "max_length", None)
    if "seq_lengths" in columns:
        return Packed(size if isinstance(size, int) else max(widths), tokens)
    same = len(set(widths)) == 1
    if same and "position_ids" in tokens and any(e["position_ids"].count(0) > 1 for e in sample):
        others = tuple(c for c in columns if c not in tokens and c != "packing_params")
        return Knapsack(widths[0], tokenizer.pad_token_id, sample[0].get("packing_params"), others)
    if getattr(trainer.args, "packing", False) and getattr(trainer.args, "packing_strategy", "") == "wrapped":
        return Wrapped(size if isinstance(size, int) else max(widths), tokens, _documents(examples, tokenizer))
    if not same or len(widths) < 2:
        return Layout()
    if "attention_mask" in columns and any(0 in e["attention_mask"] for e in sample):
        return _padded(sample, widths[0], tokens)
    if set(columns) <= BARE and _cut_anywhere(sample):
        return Wrapped(widths[0], tokens, _documents(examples, tokenizer))
    return Layout()


def _cut_anywhere(sample: Sequence[Example]) -> bool:
    """Whether rows of one length are pieces of a stream: trained on throughout, ending in tokens that no end of a text has in common."""
    return all(e.get("labels", e["input_ids"]) == e["input_ids"] for e in sample) and len({e["input_ids"][-1] for e in sample}) > 1


def _documents(examples: Examples, tokenizer: Any) -> int:
    """How many documents a stream holds: its end-of-sequence tokens, by those that one exchange in the chat template has."""
    eos = tokenizer.eos_token_id
    one = chat.encode(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).ids.count(eos)
    ends: int = sum(e["input_ids"].count(eos) for e in examples.select(["input_ids"]))
    return max(1, round(ends / max(1, one)))


def _padded(sample: Sequence[Example], length: int, columns: Sequence[str]) -> Padded:
    example = next(e for e in sample if 0 in e["attention_mask"])
    left = example["attention_mask"][0] == 0
    at = 0 if left else length - 1
    return Padded(length, left, {c: example[c][at] for c in columns})
