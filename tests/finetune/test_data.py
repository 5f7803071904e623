"""Safety rows in a trainer are, token for token, what the same trainer makes of them when they stand in the user's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from resafe.errors import ResafeError
from resafe.finetune.mix import mix_file
from resafe.finetune.session import attach
from resafe.lab.attacks import attack_rows
from resafe.rows import Row
from tests.conftest import write_rows
from tests.finetune.trainers import SHAPES, WIDE, plain, trl_dpo, trl_sft

SPEC = "mix_safety:ratio=0.5"
OWN = [{"messages": r["messages"]} for r in attack_rows("new_skill")[:24]]


def mixed_by_file(rows: list[Any], folder: Path, spec: str = SPEC, **options: Any) -> tuple[list[Row], dict[str, Any]]:
    """(rows of the file that `resafe mix` makes, what it says about it)."""
    source = write_rows(folder / "own.jsonl", rows)
    facts = mix_file(source, folder / "mixed.jsonl", [spec], "lab", **options)
    return [json.loads(line) for line in (folder / "mixed.jsonl").read_text().splitlines()], facts


def columns(dataset: Any, *names: str) -> list[Any]:
    rows = [dataset[i] for i in range(len(dataset))]
    return [[torch.as_tensor(r[n]).tolist() for n in names] for r in rows]


@pytest.mark.parametrize("layout", ["answer", "all", "padded", "left", "torch"])
def test_a_plain_trainers_rows_are_as_if_mixed_by_file(layout: str, aligned: Path, tmp_path: Path) -> None:
    trainer = attach(plain(aligned, OWN, tmp_path / "a", layout), SPEC, safety_data="lab")
    rows, facts = mixed_by_file(OWN, tmp_path)
    other = plain(aligned, rows, tmp_path / "b", layout)
    names = ("input_ids", "attention_mask", "labels")
    assert len(trainer.train_dataset) == 24 + 12 + 6
    # the trainer saw tokens, not texts: the same rows in the same order all the same
    assert columns(trainer.train_dataset, *names) == columns(other.train_dataset, *names)


@pytest.mark.parametrize("args", [{}, {"assistant_only_loss": True}, {"completion_only_loss": True}])
@pytest.mark.parametrize("shape", SHAPES)
def test_trl_rows_are_as_if_mixed_by_file(shape: str, args: dict[str, Any], aligned: Path, tmp_path: Path) -> None:
    own = [SHAPES[shape](r) for r in OWN]
    if args and (shape == "texts" and "assistant_only_loss" in args or shape == "messages" and "completion_only_loss" in args):
        pytest.skip("TRL does not offer this loss for this shape")
    trainer = attach(trl_sft(aligned, own, tmp_path / "a", **args), SPEC, safety_data="lab")
    rows, facts = mixed_by_file(own, tmp_path)
    other = trl_sft(aligned, rows, tmp_path / "b", **args)
    assert columns(trainer.train_dataset, "input_ids", "labels") == columns(other.train_dataset, "input_ids", "labels")
    assert trainer._resafe_session.facts["sha256"] == facts["sha256"], "attach and mix make the same mixture"


def test_plain_text_rows_are_rendered_by_the_template(aligned: Path, tmp_path: Path) -> None:
    own = [{"text": f"a plain line number {i} ."} for i in range(20)]
    trainer = attach(trl_sft(aligned, own, tmp_path / "a"), SPEC, safety_data="lab")
    rows, facts = mixed_by_file(own, tmp_path, tokenizer=aligned)
    other = trl_sft(aligned, rows, tmp_path / "b")
    assert columns(trainer.train_dataset, "input_ids", "labels") == columns(other.train_dataset, "input_ids", "labels")
    assert trainer._resafe_session.facts["sha256"] == facts["sha256"]


def documents(dataset: Any) -> list[Any]:
    """Packed rows taken apart, sorted: packing may order and fill bins in more than one way."""
    found = []
    for row in dataset:
        at = 0
        for n in row["seq_lengths"]:
            found.append((row["input_ids"][at : at + n], row["labels"][at : at + n]))
            at += n
        assert at == len(row["input_ids"]) <= 96
    return sorted(found)


def test_packed_rows_are_taken_apart_mixed_and_packed_again(aligned: Path, tmp_path: Path) -> None:
    trainer = attach(trl_sft(aligned, OWN, tmp_path / "a", packing=True), SPEC, safety_data="lab")
    other = trl_sft(aligned, mixed_by_file(OWN, tmp_path)[0], tmp_path / "b", packing=True)
    assert documents(trainer.train_dataset) == documents(other.train_dataset)
    assert len(trainer.train_dataset) == len(other.train_dataset), "and as tightly"
    trainer.train()


def test_pieces_of_a_stream_stay_and_safety_rows_get_rows_of_their_own(aligned: Path, tmp_path: Path) -> None:
    for trainer in (plain(aligned, OWN, tmp_path / "a", "blocks"), trl_sft(aligned, OWN, tmp_path / "b", packing=True, packing_strategy="wrapped")):
        before = columns(trainer.train_dataset, "input_ids")
        attach(trainer, SPEC, safety_data="lab")
        after = columns(trainer.train_dataset, "input_ids")
        assert [r for r in after if r in before] == before
        new = [r[0] for r in after if r not in before]
        text = trainer.processing_class.decode([t for r in new for t in r])
        assert {len(r) for r in new} == {len(before[0][0])} and text.count("<|user|>") >= 17, "12 refusals and 6 contrast rows, filled up"
        assert trainer._resafe_session.facts["documents_before"] == pytest.approx(24, abs=1)
        trainer.train()


def test_replace_takes_as_many_rows_from_a_packed_stream_as_it_adds(aligned: Path, tmp_path: Path) -> None:
    trainer = plain(aligned, OWN, tmp_path / "a", "blocks")
    n = len(trainer.train_dataset)
    attach(trainer, SPEC, safety_data="lab", mix_mode="replace")
    assert len(trainer.train_dataset) == n and trainer._resafe_session.facts["steps"] == trainer._resafe_session.facts["steps_before"]


def test_a_stream_is_interleaved_and_max_steps_stays(aligned: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    trainer = attach(plain(aligned, OWN, tmp_path / "a", "stream", max_steps=10), "mix_safety:ratio=0.25,contrast=0", safety_data="lab", log=lines.append)
    own = [tuple(r["input_ids"]) for r in plain(aligned, OWN, tmp_path / "b").train_dataset]
    read = [tuple(next_["input_ids"]) for next_, _ in zip(trainer.train_dataset, range(40))]
    assert 8 - 3 <= sum(r not in own for r in read) <= 8 + 3, "a fifth of 10 steps of 4 rows"
    assert [r for r in read if r in own][:24] == own[: len([r for r in read if r in own][:24])]
    assert any("max_steps=10 stays" in line for line in lines)
    trainer.train()
    assert trainer.state.global_step == 10


def preference(rows: list[Any]) -> list[dict[str, Any]]:
    return [{"prompt": r["messages"][:-1], "chosen": r["messages"][-1:], "rejected": [{"role": "assistant", "content": "no ."}]} for r in rows]


def test_preference_rows_join_a_dpo_trainer(aligned: Path, tmp_path: Path) -> None:
    own = preference(OWN)
    trainer = attach(trl_dpo(aligned, own, tmp_path / "a"), SPEC, safety_data="lab")
    rows, facts = mixed_by_file(own, tmp_path)
    other = trl_dpo(aligned, rows, tmp_path / "b")
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert columns(trainer.train_dataset, *names) == columns(other.train_dataset, *names)
    assert trainer._resafe_session.facts["sha256"] == facts["sha256"]
    trainer.train()


def test_precomputed_references_are_refused(aligned: Path, tmp_path: Path) -> None:
    with pytest.raises(ResafeError, match="precompute_ref_log_probs=False"):
        attach(trl_dpo(aligned, preference(OWN), tmp_path / "a", precompute_ref_log_probs=True), SPEC, safety_data="lab")


def test_the_trainers_tokenizer_is_not_touched(aligned: Path, tmp_path: Path) -> None:
    trainer = plain(aligned, OWN, tmp_path / "a")
    trainer.processing_class.chat_template = None
    attach(trainer, SPEC, safety_data="lab")
    assert trainer.processing_class.chat_template is None


def test_rows_wider_than_the_users_padding_are_cut_to_it(aligned: Path, tmp_path: Path) -> None:
    trainer = attach(plain(aligned, OWN, tmp_path / "a", "padded"), SPEC, safety_data="lab")
    assert {len(r["input_ids"]) for r in trainer.train_dataset} == {WIDE}


@pytest.mark.parametrize("name", ["RewardTrainer", "GRPOTrainer", "KTOTrainer", "PairwiseTrainer"])
def test_trainers_of_rewards_are_refused_by_the_name_of_any_ancestor(name: str, aligned: Path, tmp_path: Path) -> None:
    trainer = plain(aligned, OWN, tmp_path / "a")
    trainer.__class__ = type("Mine", (type(name, (type(trainer),), {}),), {})
    with pytest.raises(ResafeError, match=f"{name} trains on rewards or labels"):
        attach(trainer, SPEC, safety_data="lab")


def test_what_holds_no_answers_is_refused(aligned: Path, tmp_path: Path) -> None:
    trainer = plain(aligned, OWN, tmp_path / "a")
    trainer.model.__class__ = type("LlamaForSequenceClassification", (type(trainer.model),), {})
    with pytest.raises(ResafeError, match="LlamaForSequenceClassification does not write answers"):
        attach(trainer, SPEC, safety_data="lab")
    with pytest.raises(ResafeError, match="no training rows"):
        attach(plain(aligned, [], tmp_path / "b"), SPEC, safety_data="lab")
    odd = plain(aligned, OWN, tmp_path / "c")
    odd.train_dataset = odd.train_dataset.rename_column("input_ids", "tokens")
    with pytest.raises(ResafeError, match="neither input_ids nor a conversation"):
        attach(odd, SPEC, safety_data="lab")
    seen = plain(aligned, OWN, tmp_path / "d")
    seen.train_dataset = seen.train_dataset.add_column("pixel_values", [[0.0]] * 24)
    with pytest.raises(ResafeError, match="vision"):
        attach(seen, SPEC, safety_data="lab")


SHORT = [{"messages": [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "yes ."}]}] * 8


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_safety_rows_whose_answers_would_be_cut_off_are_refused(kind: str, aligned: Path, tmp_path: Path) -> None:
    if kind == "sft":
        trainer = trl_sft(aligned, [SHAPES["turns"](r) for r in SHORT], tmp_path / "a", max_length=8)
    else:
        trainer = trl_dpo(aligned, preference(SHORT), tmp_path / "a", max_length=8)
    with pytest.raises(ResafeError, match="keep no answer within the trainer's 8 tokens"):
        attach(trainer, SPEC, safety_data="lab")


def test_a_row_without_text_is_named(aligned: Path, tmp_path: Path) -> None:
    trainer = trl_sft(aligned, [SHAPES["turns"](r) for r in OWN], tmp_path / "a")
    rows = trainer.train_dataset.to_list()
    rows[3]["prompt"] = None
    trainer.train_dataset = type(trainer.train_dataset).from_list(rows, features=trainer.train_dataset.features)
    with pytest.raises(ResafeError, match="training row 3: a text or a list of messages"):
        attach(trainer, SPEC, safety_data="lab")
