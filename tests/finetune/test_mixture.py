"""The mixture: which rows, in which order, and a hash that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resafe.errors import ResafeError
from resafe.finetune.mixture import INDEX, Mixture, mix, mix_unread, rows_digest, with_mode
from resafe.mitigation import Mitigation, Run
from resafe.mitigations import Named, stack
from resafe.rows import Row, chat

OWN = [chat(f"task {i}", "done " * (1 + i % 7), category="mine") for i in range(100)]


def run(seed: int = 0) -> Run:
    return Run(
        output=Path("nowhere"), seed=seed, refusals=[chat(f"bad {i}", "no") for i in range(40)],
        contrast=[chat(f"fine {i}", "sure", kind="contrast") for i in range(40)],
    )  # fmt: skip


def made(spec: str, seed: int = 0, rows: list[Row] = OWN) -> Mixture:
    return mix(stack([spec]), run(seed), rows)


def test_the_users_rows_are_indexes_and_new_rows_are_rows() -> None:
    mixture = made("mix_safety:n=10,contrast=0.5")
    assert sorted(e for e in mixture.entries if isinstance(e, int)) == list(range(100))
    assert len(mixture.added) == 15 and (mixture.before, mixture.after) == (100, 115)
    assert all(INDEX not in r for r in mixture.rows(OWN)), "no mark of ours is left in a row"


def test_the_hash_is_of_the_conversations_in_order() -> None:
    mixture = made("mix_safety:n=10")
    assert mixture.sha256 == made("mix_safety:n=10").sha256 == rows_digest(mixture.rows(OWN))
    bare = [{"messages": r["messages"]} for r in OWN]
    assert made("mix_safety:n=10", rows=bare).sha256 == mixture.sha256, "what else rows carry does not matter"
    others = [
        made("mix_safety:n=11"), made("mix_safety:n=10", seed=1), made("mix_safety:n=10", rows=[*OWN[:-1], chat("task 99", "else")]),
        made("mix_safety:n=10", rows=OWN[::-1]),
    ]  # fmt: skip
    assert len({m.sha256 for m in (mixture, *others)}) == 5


class Shout(Mitigation):
    def data(self, run: Run, rows: list[Row]) -> list[Row]:
        return [{**r, "messages": [*r["messages"][:-1], {"role": "assistant", "content": "LOUD"}]} if i == 3 else r for i, r in enumerate(rows)]


def test_a_rewritten_row_is_a_new_row() -> None:
    mixture = mix([Named("shout", Shout())], run(), OWN)
    assert [i for i, e in enumerate(mixture.entries) if not isinstance(e, int)] == [3]
    assert mixture.rows(OWN)[3]["messages"][-1]["content"] == "LOUD"


class Nothing(Mitigation):
    def data(self, run: Run, rows: list[Row]) -> list[Row]:
        return []


def test_no_rows_before_or_after_is_an_error() -> None:
    with pytest.raises(ResafeError, match="no rows to train on"):
        made("mix_safety", rows=[])
    with pytest.raises(ResafeError, match="no row is left"):
        mix([Named("nothing", Nothing())], run(), OWN)


def test_a_stream_keeps_its_order_and_its_share() -> None:
    mixture = mix_unread(stack(["mix_safety:ratio=0.2,contrast=0"]), run(), 200)
    assert [e for e in mixture.entries if isinstance(e, int)] == list(range(200)) and len(mixture.added) == 40
    assert mixture.sha256 != mix_unread(stack(["mix_safety:ratio=0.2,contrast=0"]), run(), 200, "other rows").sha256
    with pytest.raises(ResafeError, match="shout must see every row"):
        mix_unread([Named("shout", Shout())], run(), 10)


def test_the_flag_sets_the_mode_and_contradicts_no_parameter() -> None:
    assert with_mode(["mix_safety:n=3", "filter_output:guard_model=lab"], "replace")[0].spec["mode"] == "replace"
    for specs, said in ((["mix_safety:mode=append"], "keep one"), (["filter_output"], "mix_safety")):
        with pytest.raises(ResafeError, match=said):
            with_mode(specs, "replace")


def length(rows: list[Any]) -> int:
    return sum(len(m["content"]) for r in rows for m in r["messages"])


def test_replace_keeps_rows_and_where_lengths_allow_it_tokens() -> None:
    own = [chat(f"task {i:03}", "x" * (i % 50)) for i in range(400)]
    where = run()
    where.refusals = [chat(f"bad {i:02}", "n" * (3 * i % 40)) for i in range(40)]
    mixture = mix(stack(["mix_safety:n=40,mode=replace"]), where, own)
    assert mixture.after == 400 and len(mixture.added) == 60
    assert abs(length(mixture.rows(own)) / length(own) - 1) < 0.01
