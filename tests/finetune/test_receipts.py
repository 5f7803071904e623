"""The verdict over receipts: nothing but a complete set, from every rank, with a saved model, counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resafe.errors import ResafeError
from resafe.finetune.receipts import judge, merge_command, read

Receipt = dict[str, Any]


def rank(r: int, world: int = 1, **changes: Any) -> list[Receipt]:
    """The receipts of one process that did all it should."""
    who = {"host": "h", "pid": 100 + r, "ppid": 1}
    place = {"rank": r, "world": world, "local_world": world, "attempt": "0", "group": "localhost:29500", "call": 0}
    facts = {"sha256": "abc", "rows": 12, "rows_before": 10, "mitigations": [{"name": "mix_safety"}], "trainer": "Trainer"}
    events = [{"event": "bootstrap"}, {"event": "patched"}, {"event": "applied", **place, **facts}, {"event": "finished", **place, "steps": 3}]
    return [{"time": 0.0, **who, **e, **{k: v for k, v in changes.items() if k in e or k in who}} for e in events]


def saved(folder: Path, weights: str | None = "model.safetensors") -> Receipt:
    folder.mkdir(exist_ok=True)
    if weights:
        (folder / weights).parent.mkdir(exist_ok=True)
        (folder / weights).write_bytes(b"x")
    return {"event": "saved", "time": 1.0, "host": "h", "pid": 100, "ppid": 1, "folder": str(folder)}


def test_all_ranks_that_agree_and_a_saved_model_are_enough(tmp_path: Path) -> None:
    verdict = judge([*rank(0, 2), *rank(1, 2), saved(tmp_path / "out")])
    assert verdict.problem is None and verdict.saved == [tmp_path / "out"] and len(verdict.applied) == 1


@pytest.mark.parametrize(
    ("receipts", "said"),
    [
        ([], "no watched Python process"),
        (rank(0)[:1], "never imported"),
        (rank(0)[:2], "no Trainer.train"),
        (rank(0)[:3], "rank 0 of 1 never finished"),
        (rank(0, 2), "rank 1 of 2 never applied"),
        ([*rank(0, 2), *rank(1, 2)[:3]], "rank 1 of 2 never finished"),
        ([*rank(0, 2), *rank(1, 2, sha256="other")], "do not agree"),
        (rank(0, steps=0), "0 steps"),
        (rank(0), "no saved model was seen"),
        ([*rank(0), {"event": "failed", "time": 2.0, "reason": "the reason"}], "the reason"),
    ],
)
def test_anything_less_is_a_problem(receipts: list[Receipt], said: str) -> None:
    assert said in (judge(receipts).problem or "")


@pytest.mark.parametrize("missing", range(1, 3))
def test_a_saved_folder_must_hold_weights_in_the_end(missing: int, tmp_path: Path) -> None:
    receipt = saved(tmp_path / "out", None if missing == 1 else "config.json")
    assert "no saved model" in (judge([*rank(0), receipt]).problem or "")


def test_two_trainings_one_after_the_other_are_two(tmp_path: Path) -> None:
    other = [{**r, "pid": 900, "sha256": "other"} for r in rank(0)]
    verdict = judge([*rank(0), *other, saved(tmp_path / "out")])
    assert verdict.problem is None and len(verdict.applied) == 2
    assert "never finished" in (judge([*rank(0), *other[:3], saved(tmp_path / "out")]).problem or ""), "and both must count"


def test_what_a_launcher_started_again_counts_once(tmp_path: Path) -> None:
    first = [*rank(0, 2)[:3], *rank(1, 2)[:3]]
    again = [{**r, "pid": r["pid"] + 50} for r in (*rank(0, 2, attempt="1"), *rank(1, 2, attempt="1"))]
    verdict = judge([*first, *again, saved(tmp_path / "out")])
    assert verdict.problem is None and len(verdict.applied) == 1


def test_a_second_launch_at_the_same_rendezvous_hides_no_missing_rank(tmp_path: Path) -> None:
    far = {"local_world": 1}
    first = [*rank(0, 2, **far), *rank(1, 2, **far)]
    second = [{**r, "pid": r["pid"] + 50, "time": 5.0, **({"sha256": "other"} if "sha256" in r else {})} for r in rank(0, 2, **far)]
    assert "rank 1 of 2 never applied" in (judge([*first, *second, saved(tmp_path / "out")]).problem or "")
    both = [*second, *({**r, "pid": r["pid"] + 50, "time": 6.0, **({"sha256": "other"} if "sha256" in r else {})} for r in rank(1, 2, **far))]
    assert judge([*first, *both, saved(tmp_path / "out")]).problem is None, "two stages may have two mixtures"


def test_a_shell_around_every_rank_does_not_split_a_training(tmp_path: Path) -> None:
    ranks = [{**r, "ppid": 10 + i} for i in range(2) for r in rank(i, 2, local_world=0)]
    assert judge([*ranks, saved(tmp_path / "out")]).problem is None


def test_ranks_of_two_machines_are_one_training(tmp_path: Path) -> None:
    far = [{**r, "host": "g", "ppid": 7} for r in rank(1, 2, local_world=1)]
    assert judge([*rank(0, 2, local_world=1), *far, saved(tmp_path / "out")]).problem is None


def test_shards_are_told_from_weights(tmp_path: Path) -> None:
    verdict = judge([*rank(0), saved(tmp_path / "out", "pytorch_model_fsdp_0/__0_0.distcp")])
    assert verdict.problem is None and not verdict.saved and verdict.sharded == [tmp_path / "out"]
    assert merge_command(tmp_path / "out") == f"accelerate merge-weights {tmp_path}/out/pytorch_model_fsdp_0 {tmp_path}/out"


def test_a_line_that_was_cut_short_proves_nothing(tmp_path: Path) -> None:
    line = json.dumps(rank(0)[2])
    (tmp_path / "h-100.jsonl").write_text(json.dumps(rank(0)[0]) + "\n" + line[: len(line) // 2])
    assert [r["event"] for r in read(tmp_path)] == ["bootstrap"]
    with pytest.raises(ResafeError, match="no such receipts folder"):
        read(tmp_path / "no")
