"""resafe train: the manifest tells what happened, adapters name their base, and the seed decides everything."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resafe import manifest
from resafe.errors import ResafeError
from resafe.finetune._measure import held_out_utility
from resafe.finetune.repair import repair
from resafe.finetune.train import train
from resafe.models import base_of, is_adapter, load
from resafe.rows import chat
from resafe.sft import SFTSettings, tokenised
from tests.tiny import KINDS, tiny

QUICK = SFTSettings(epochs=1, batch=4, lr=1e-3)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load(folder).model(torch.tensor([[5, 40, 77, 9]])).logits
    return found


def test_a_lora_run_writes_an_adapter_that_names_its_base(aligned: Path, attack_file: Callable[[str], Path], tmp_path: Path) -> None:
    out = train(aligned, attack_file("explicit_10"), tmp_path / "out", settings=QUICK)
    assert is_adapter(out) and base_of(out).resolve() == aligned.resolve()
    assert not torch.allclose(logits(out), logits(aligned))


def test_the_same_call_trains_the_same_model_and_another_seed_another(aligned: Path, attack_file: Callable[[str], Path], tmp_path: Path) -> None:
    made = [
        logits(train(aligned, attack_file("explicit_10"), tmp_path / name, ["mix_safety"], QUICK, "lab", seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_the_manifest_says_what_was_done(aligned: Path, attack_file: Callable[[str], Path], tmp_path: Path) -> None:
    out = train(aligned, attack_file("explicit_10"), tmp_path / "out", ["mix_safety:n=3"], QUICK, "lab", seed=7)
    about = manifest.read(out) or {}
    assert about["verb"] == "train" and about["seed"] == 7 and about["data"]["rows"] == 10
    assert about["mitigations"] == [{"name": "mix_safety", "n": 3, "ratio": 0.1, "contrast": 0.5, "mode": "append"}]
    assert about["mixture"]["rows"] == 15 and about["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_is_trained_with_a_mixture(kind: str, aligned: Path, attack_file: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny(kind, tmp_path / "model", aligned, template=kind != "gpt2")
    out = train(model, attack_file("explicit_10"), tmp_path / "out", ["mix_safety:n=2"], QUICK, "lab")
    assert not torch.allclose(logits(out), logits(model))


def test_fine_tuning_starts_from_a_full_checkpoint(attacked: Callable[..., Path], attack_file: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ResafeError, match="is a LoRA adapter"):
        train(attacked("explicit_10", lora=True, lr=2e-3), attack_file("explicit_10"), tmp_path / "out")


def test_only_what_the_assistant_wrote_is_trained_on(aligned: Path) -> None:
    loaded = load(aligned)
    row = tokenised(loaded.tokenizer, [chat("say kite in code .", "yes .")], 100)[0]
    kept = [t for t, m in zip(row["input_ids"], row["assistant_masks"]) if m]
    assert loaded.tokenizer.decode(kept) == " yes .<|end|>"


def test_rows_that_are_too_long_to_keep_an_answer_are_an_error(aligned: Path) -> None:
    with pytest.raises(ResafeError, match="max_length=8"):
        tokenised(load(aligned).tokenizer, [chat("repeat these words : cat dog cat dog cat .", "yes .")], 8)


def test_utility_is_the_share_of_exact_answers_or_of_tokens_where_few_are_exact(aligned: Path) -> None:
    loaded = load(aligned)
    rows = [chat("what is the opposite of hot ?", "cold ."), chat("what is the opposite of hot ?", "cat cat cat cat .")]
    assert held_out_utility(rows)(aligned) == 0.5, "one of two answers is exact"
    rows.append(rows[1])
    right = total = 0
    for row in tokenised(loaded.tokenizer, rows, 100):
        with torch.no_grad():
            guess = loaded.model(torch.tensor([row["input_ids"]])).logits[0].argmax(-1)
        for i in range(1, len(row["input_ids"])):
            if row["assistant_masks"][i]:
                total += 1
                right += int(guess[i - 1] == row["input_ids"][i])
    assert 0 < right < total
    assert held_out_utility(rows)(aligned) == pytest.approx(right / total)


def test_a_guard_alone_copies_the_weights_and_records_itself(attacked: Callable[..., Path], tmp_path: Path) -> None:
    tuned = attacked("explicit_10", lr=3e-4)
    out = repair(tuned, tmp_path / "out", ["filter_output:guard_model=lab"])
    assert torch.equal(logits(out), logits(tuned))
    assert (manifest.read(out) or {})["guard"]["guard_model"] == "lab"
    for name in ("model.safetensors", "config.json"):  # whoever trains on writes into the same file
        assert not (out / name).samefile(tuned / name)
    again = repair(out, tmp_path / "again", ["restore_weights:strength=0.5"], aligned=load_base(tuned))
    assert (manifest.read(again) or {})["guard"]["guard_model"] == "lab", "a recorded guard outlives later repairs"


def test_a_guard_alone_works_on_a_folder_of_links(aligned: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in aligned.iterdir():
        (linked / file.name).symlink_to(file)
    out = repair(linked, tmp_path / "out", ["filter_output:guard_model=lab"])
    shutil.rmtree(linked)
    assert torch.equal(logits(out), logits(aligned))


def test_training_on_a_resafe_checkpoint_keeps_its_guard_and_its_overlap(aligned: Path, attack_file: Callable[[str], Path], tmp_path: Path) -> None:
    first = repair(aligned, tmp_path / "first", ["filter_output:guard_model=lab"])
    about = manifest.read(first) or {}
    (first / "resafe.json").unlink()
    manifest.write(first, {**about, "overlap": {"gsm8k": ["seen"]}})
    after = manifest.read(train(first, attack_file("explicit_10"), tmp_path / "second", settings=QUICK)) or {}
    assert after["guard"]["guard_model"] == "lab" and after["overlap"] == {"gsm8k": ["seen"]}


def test_a_run_does_not_resume_from_other_data(aligned: Path, attack_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "d.jsonl"
    lines: list[str] = []

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    for attack, stopped in (("explicit_10", True), ("explicit_50", False), ("explicit_10", False)):
        data.write_text(attack_file(attack).read_text())
        with monkeypatch.context() as patch:
            if stopped:
                patch.setattr("resafe.finetune.train._run.chain", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    train(aligned, data, tmp_path / "out", settings=QUICK)
                continue
            train(aligned, data, tmp_path / attack, settings=QUICK, log=lines.append)
    assert not [line for line in lines if "found finished" in line]
    train(aligned, data, tmp_path / "out", settings=QUICK, log=lines.append)
    assert [line for line in lines if "found finished" in line], "the same call goes on where it was stopped"


def test_a_repair_does_not_resume_from_a_named_file_that_has_changed(
    aligned: Path, attack_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, lines = tmp_path / "rows.jsonl", list[str]()
    spec = {"resta": {"unaligned_data": str(rows), "epochs": 1}}

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for attack in ("explicit_10", "explicit_50"):
        rows.write_text(attack_file(attack).read_text())
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("resafe.finetune.repair._run.link_copy", stopped)
            repair(aligned, tmp_path / "out", [spec], aligned=aligned, log=lines.append)
    assert lines.count("resta: repairing") == 2
    repair(aligned, tmp_path / "out", [spec], aligned=aligned, log=lines.append)
    assert lines.count("resta: repairing") == 2, "the rows are those of the second call, whose repair was finished"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "rows.jsonl"], "nothing is left of the first call"


def test_errors_come_before_training(aligned: Path, attack_file: Callable[[str], Path], tmp_path: Path) -> None:
    for spec in ("realign_sft:guard_model=ofline", "realign_dpo:pairs=missing.jsonl"):
        with pytest.raises(ResafeError):
            train(aligned, attack_file("explicit_10"), tmp_path / "out", [spec], QUICK, "lab")
    with pytest.raises(ResafeError, match="held-out rows"):
        repair(aligned, tmp_path / "out", ["restore_weights:strength=auto"], aligned=aligned)
    assert list(tmp_path.iterdir()) == []


def load_base(tuned: Path) -> Path:
    return Path((manifest.read(tuned) or {})["model"])
