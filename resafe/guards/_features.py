"""Hashed features of an exchange: word 1- and 2-grams of prompt and response in separate namespaces, and a few crosses.

Every namespace's block is binary and has length 1, so that a long answer does not outvote the prompt. Hashes are crc32:
the same on every machine and in every process.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from resafe.guards._base import Exchange
from resafe.guards.rules import is_refusal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Weights = npt.NDArray[np.floating[Any]]

VERSION = "6"  # raise it when `blocks`, what is read (linear.py) or the rules change: fitted files are refused then
OPENING = 24  # words of the response that also count on their own


def words(text: str) -> list[str]:
    """Lower-case words and the marks ? and !, after NFKC, without invisible characters."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    return re.findall(r"\w+(?:'\w+)*|[?!]", text)


def blocks(exchange: Exchange) -> list[tuple[str, set[str]]]:
    """(namespace, features) of one exchange; the prompt is all user turns, and leaves no trace when it is empty."""
    conversation, response = exchange
    prompt = words("\n".join(m["content"] for m in conversation if m["role"] == "user"))
    answer = words(response)
    kind = "refuses" if is_refusal(response) else "answers"
    length = f"length {min(len(answer).bit_length(), 10)}"
    return [
        ("p", set(prompt)),
        ("pp", set(_pairs(prompt))),
        ("r", set(answer)),
        ("rr", set(_pairs(answer))),
        ("o", {*answer[:OPENING], *_pairs(["^", *answer[:OPENING]])}),
        (f"x {kind}", set(prompt)),
        ("k", {kind, length, f"{kind} {length}"}),
    ]


def _pairs(items: Sequence[str]) -> Iterable[str]:
    return (f"{a} {b}" for a, b in zip(items, items[1:]))


def hashed(exchange: Exchange, bits: int) -> tuple[list[int], list[float]]:
    """Indices below 2**bits and values of one exchange's features. Collisions add up."""
    indices: list[int] = []
    values: list[float] = []
    mask = (1 << bits) - 1
    for space, found in blocks(exchange):
        indices += [zlib.crc32(f"{space}:{f}".encode()) & mask for f in sorted(found)]
        values += [max(1, len(found)) ** -0.5] * len(found)
    return indices, values


def matrix(exchanges: Sequence[Exchange], bits: int) -> Any:
    """A scipy CSR matrix with one row for each exchange."""
    import numpy as np
    from scipy.sparse import csr_matrix

    rows = [hashed(e, bits) for e in exchanges]
    starts = np.cumsum([0, *(len(i) for i, _ in rows)])
    indices = np.fromiter((i for r, _ in rows for i in r), np.int64)
    values = np.fromiter((v for _, r in rows for v in r), np.float64)
    return csr_matrix((values, indices, starts), shape=(len(rows), 1 << bits))
