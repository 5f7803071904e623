"""mix_safety: counts, order, determinism and what it refuses to train on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from resafe.errors import ResafeError
from resafe.heldout import suite_prompts
from resafe.mitigation import Run
from resafe.mitigations import make
from resafe.rows import Row, chat, key, user_text


def run(seed: int = 0, refusals: int = 30, contrast: int = 30) -> Run:
    return Run(
        output=Path("nowhere"), seed=seed, refusals=[chat(f"bad {i}", "no") for i in range(refusals)],
        contrast=[chat(f"fine {i}", "sure") for i in range(contrast)],
    )  # fmt: skip


TASK = [chat(f"task {i}", "done") for i in range(100)]


def mixed(spec: str, **where: int) -> list[Row]:
    return make(spec).mitigation.data(run(**where), list(TASK))


def kinds(rows: list[Row]) -> Counter[str]:
    return Counter(user_text(r["messages"]).split()[0] for r in rows)


def test_a_ratio_is_refusals_per_row_and_contrast_per_refusal() -> None:
    assert kinds(mixed("mix_safety:ratio=0.2,contrast=0.5")) == {"task": 100, "bad": 20, "fine": 10}


def test_n_counts_refusals() -> None:
    assert kinds(mixed("mix_safety:n=7,contrast=0")) == {"task": 100, "bad": 7}


def test_replace_keeps_the_number_of_rows() -> None:
    rows = mixed("mix_safety:n=10,contrast=1,mode=replace")
    assert kinds(rows) == {"task": 80, "bad": 10, "fine": 10}


def test_replace_refuses_to_crowd_out_all_rows() -> None:
    with pytest.raises(ResafeError, match="in place of all 100 rows"):
        mixed("mix_safety:n=100,mode=replace")


def test_more_than_there_are_repeats_each_equally() -> None:
    counts = Counter(user_text(r["messages"]) for r in mixed("mix_safety:n=60,contrast=0") if r["messages"][1]["content"] == "no")
    assert set(counts.values()) == {2} and len(counts) == 30


def test_the_mixture_depends_on_the_seed_and_on_nothing_else() -> None:
    assert mixed("mix_safety", seed=1) == mixed("mix_safety", seed=1) != mixed("mix_safety", seed=2)


def test_safety_rows_are_spread_over_the_data() -> None:
    places = [i for i, r in enumerate(mixed("mix_safety:n=30,contrast=0")) if r["messages"][1]["content"] == "no"]
    assert min(places) < 30 and max(places) > 100


def test_evaluation_prompts_never_enter() -> None:
    where = run(refusals=3)
    where.refusals += [chat(suite_prompts("advbench")[0].upper(), "no")]
    rows = make("mix_safety:n=50,contrast=0").mitigation.data(where, list(TASK))
    assert key(suite_prompts("advbench")[0]) not in {key(user_text(r["messages"])) for r in rows}
