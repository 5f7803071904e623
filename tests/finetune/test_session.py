"""`resafe.attach` in a notebook: one line before train(), manifests beside whatever is saved, nothing applied twice."""

from __future__ import annotations

import copy
import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import resafe
from resafe import manifest
from resafe.errors import ResafeError
from resafe.finetune.inject._resafe_start import patch, receipt
from resafe.lab.attacks import attack_rows
from tests.finetune.trainers import plain, trl_sft

OWN = [{"messages": r["messages"]} for r in attack_rows("new_skill")[:12]]


def test_attach_is_one_line_and_leaves_a_manifest_wherever_the_model_is_saved(aligned: Path, tmp_path: Path) -> None:
    trainer = plain(aligned, OWN, tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1)
    assert resafe.attach(trainer, "mix_safety:n=4", "filter_output:guard_model=lab", safety_data="lab", seed=3) is trainer
    trainer.train()
    trainer.save_model()
    trainer.model.save_pretrained(tmp_path / "again")
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1", tmp_path / "again"):
        about = manifest.read(folder) or {}
        assert about["mixture"]["rows"] == 12 + 4 + 2 and about["seed"] == 3 and about["guard"]["guard_model"] == "lab", folder
        assert about["model"] == str(aligned)


def test_a_copy_of_the_model_saves_its_own_weights(aligned: Path, tmp_path: Path) -> None:
    """Nothing of ours sits on the model instance, so a changed copy is not mistaken for the original."""
    trainer = resafe.attach(plain(aligned, OWN, tmp_path / "out", max_steps=1), "mix_safety:n=4", safety_data="lab")
    trainer.train()
    clone = copy.deepcopy(trainer.model)
    with torch.no_grad():
        clone.model.norm.weight.zero_()
    clone.save_pretrained(tmp_path / "clone")
    assert not load_weight(tmp_path / "clone").any() and (manifest.read(tmp_path / "clone")) is None


def load_weight(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")["model.norm.weight"]


def test_a_trainer_is_let_go_and_its_model_still_remembered(aligned: Path, tmp_path: Path) -> None:
    import gc
    import weakref

    trainer = resafe.attach(plain(aligned, OWN, tmp_path / "out", max_steps=1), "mix_safety:n=4", safety_data="lab")
    model, gone = trainer.model, weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None
    model.save_pretrained(tmp_path / "late")
    assert (manifest.read(tmp_path / "late") or {})["mixture"]["rows"] == 18


def test_a_merged_adapter_is_still_the_trained_model(aligned: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    trainer = plain(aligned, OWN, tmp_path / "out", max_steps=2)
    trainer.model = trainer.model_wrapped = get_peft_model(trainer.model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    resafe.attach(trainer, "mix_safety:n=4", safety_data="lab").train()
    trainer.model.save_pretrained(tmp_path / "adapter")
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for folder in ("adapter", "merged"):
        assert (manifest.read(tmp_path / folder) or {})["mixture"]["added"] == 6


def test_what_attach_cannot_do_is_refused(aligned: Path, tmp_path: Path) -> None:
    trainer = plain(aligned, OWN, tmp_path / "out")
    with pytest.raises(ResafeError, match="resafe repair FOLDER"):
        resafe.attach(trainer, "mix_safety", "realign_dpo")
    with pytest.raises(ResafeError, match="at least one"):
        resafe.attach(trainer)
    resafe.attach(trainer, "mix_safety", safety_data="lab")
    with pytest.raises(ResafeError, match="already"):
        resafe.attach(trainer, "mix_safety", safety_data="lab")


def test_a_second_train_does_not_mix_again_but_another_data_set_is_mixed(aligned: Path, tmp_path: Path) -> None:
    trainer = resafe.attach(plain(aligned, OWN, tmp_path / "out", max_steps=1), "mix_safety:n=4", safety_data="lab")
    trainer.train()
    trainer.train()
    assert len(trainer.train_dataset) == 18
    trainer.train_dataset = plain(aligned, OWN[:6], tmp_path / "b").train_dataset
    trainer.train()
    assert len(trainer.train_dataset) == 6 + 6


def test_resuming_from_another_mixture_is_refused_in_a_notebook_too(aligned: Path, tmp_path: Path) -> None:
    args: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    resafe.attach(plain(aligned, OWN, tmp_path / "out", **args), "mix_safety:n=4", safety_data="lab").train()
    again = resafe.attach(plain(aligned, OWN, tmp_path / "out", **{**args, "max_steps": 3}), "mix_safety:n=4", safety_data="lab")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    other = resafe.attach(plain(aligned, OWN, tmp_path / "out", **args), "mix_safety:n=5", safety_data="lab")
    with pytest.raises(ResafeError, match="was trained on the mixture"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_no_random_number_is_drawn_from_the_users_generators(aligned: Path, tmp_path: Path) -> None:
    import random

    import numpy as np

    trainer = trl_sft(aligned, OWN, tmp_path / "out")
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    resafe.attach(trainer, "mix_safety", safety_data="lab")
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1] and torch.equal(torch.get_rng_state(), before[2])


def test_a_data_loader_of_the_scripts_own_that_does_not_read_the_mixture_is_refused(aligned: Path, tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    trainer = plain(aligned, OWN, tmp_path / "out", max_steps=1)
    own = trainer.train_dataset

    class Mine(type(trainer)):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return DataLoader(own, batch_size=2, collate_fn=self.data_collator)

    trainer.__class__ = Mine
    resafe.attach(trainer, "mix_safety:n=4,contrast=0,mode=replace", safety_data="lab")  # as many rows as before
    with pytest.raises(ResafeError, match="Mine.get_train_dataloader does not read trainer.train_dataset"):
        trainer.train()


def test_only_rank_0_writes(aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = plain(aligned, OWN, tmp_path / "out", max_steps=1)
    monkeypatch.setattr(type(trainer.args), "process_index", property(lambda _: 1))
    resafe.attach(trainer, "mix_safety:n=4", safety_data="lab")
    trainer.model.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other" / "model.safetensors").is_file() and manifest.read(tmp_path / "other") is None


def test_evaluation_prompts_among_the_users_rows_are_told_and_recorded(aligned: Path, tmp_path: Path) -> None:
    from resafe.heldout import suite_prompts
    from resafe.rows import chat

    lines: list[str] = []
    own = [*OWN, {"messages": chat(suite_prompts("xstest")[0], "sure .")["messages"]}]
    trainer = resafe.attach(trl_sft(aligned, own, tmp_path / "out", max_length=200), "mix_safety:n=2", safety_data="lab", log=lines.append)
    assert any("evaluation suite xstest" in line for line in lines)
    trainer.model.save_pretrained(tmp_path / "saved")
    assert list((manifest.read(tmp_path / "saved") or {})["overlap"]) == ["xstest"]


def test_a_library_that_executes_the_trainers_source_anew_still_works(aligned: Path, tmp_path: Path) -> None:
    """What unsloth does on a GPU: methods compiled again from their source, and TRL's class replaced by a subclass."""
    trainer = trl_sft(aligned, OWN, tmp_path / "out", max_steps=2)
    base: Any = transformers.Trainer
    source = textwrap.dedent(inspect.getsource(base._inner_training_loop))
    scope = {**vars(inspect.getmodule(base) or object()), "FAST": True}
    exec(source.replace("def _inner_training_loop", "def fast_loop"), scope)
    rebound = type("UnslothSFTTrainer", (type(trainer),), {"_inner_training_loop": scope["fast_loop"]})
    trainer.__class__ = rebound
    resafe.attach(trainer, "mix_safety:n=4", safety_data="lab").train()
    assert trainer.state.global_step == 2 and len(trainer.train_dataset) == 18


def test_the_hook_touches_nothing_inside_the_training_loop() -> None:
    class Trainer(transformers.Trainer):
        pass

    untouched = {n: getattr(transformers.Trainer, n) for n in ("_inner_training_loop", "compute_loss", "training_step", "__init__")}

    class Module:
        pass

    Module.Trainer = Trainer  # type: ignore[attr-defined]
    patch(Module)
    first = Trainer.train
    patch(Module)
    assert Trainer.train is first and Trainer.train is not transformers.Trainer.train
    assert inspect.signature(Trainer.train) == inspect.signature(transformers.Trainer.train)
    assert all(getattr(Trainer, n) is f for n, f in untouched.items())


def test_outside_a_run_no_receipt_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESAFE_RECEIPTS", raising=False)
    monkeypatch.chdir(tmp_path)
    receipt("applied", sha256="x")
    assert list(tmp_path.iterdir()) == []
