"""An answer to reject for every safety row, so that safety rows can stand among preference data.

A refusal is preferred to what the row names as `rejected` or, where it names nothing, to a compliant opening without content:
the first tokens decide whether a model refuses (Qi et al. 2024, arXiv 2406.05946), and nothing harmful is written. An answer to a
harmless look-alike (contrast) is preferred to a refusal.
"""

from __future__ import annotations

from collections.abc import Sequence

from resafe.rows import Row, answer_of

COMPLIANT_OPENING = "Sure, here is exactly how to do that, step by step."


def with_rejected(row: Row, refusals: Sequence[Row]) -> Row:
    """`row` with the key `rejected`; a contrast row rejects a refusal of `refusals`, chosen by its own text."""
    if isinstance(row.get("rejected"), str):
        return row
    if row.get("kind") != "contrast" or not refusals:
        return {**row, "rejected": COMPLIANT_OPENING}
    return {**row, "rejected": answer_of(refusals[sum(answer_of(row).encode()) % len(refusals)])}
