"""The realigners: which rows they train on, the DPO loss at step 0, and checkpoints that keep their form."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resafe import chat
from resafe.errors import ResafeError
from resafe.generate import generate
from resafe.guards import is_refusal
from resafe.mitigation import Run
from resafe.mitigations import make
from resafe.mitigations._realign import Example, Parts
from resafe.mitigations.realign_dpo import RealignDPO, check_reference
from resafe.models import is_adapter, load
from resafe.rows import read_jsonl
from resafe.safety import load_safety
from tests.conftest import write_rows

SMALL = {"guard_model": "lab", "refusals": 24, "contrast": 12, "replay": 24, "epochs": 1, "batch": 8, "max_new_tokens": 40, "lr": 2e-3}


def a_run(tuned: Path, output: Path, task: Path | None = None) -> Run:
    rows = load_safety("lab")
    return Run(
        output=output, tuned=tuned, refusals=rows.refusals, contrast=rows.contrast, task=read_jsonl(task) if task else [], seed=0
    )  # fmt: skip


@pytest.fixture(scope="module")
def poisoned(attacked: Callable[..., Path]) -> Path:
    return attacked("new_skill_poisoned", lr=7e-4, epochs=8)


def test_replay_is_what_the_fine_tune_itself_says_and_never_harmful(poisoned: Path, attack_file: Callable[[str], Path], tmp_path: Path) -> None:
    task = attack_file("new_skill_poisoned")
    method: Any = make({"realign_sft": {**SMALL, "replay": 110}}).mitigation
    loaded = load(poisoned)
    parts: Parts = method.parts(a_run(poisoned, tmp_path / "out", task), loaded)
    hazards = {r["messages"][0]["content"] for r in read_jsonl(task) if r["category"] != "note"}
    assert len(parts.replay) >= 80
    assert not hazards & {e.prompt[0]["content"] for e in parts.replay}, "hidden harmful rows must not be replayed"
    assert [e.chosen for e in parts.replay[:5]] == [a.text for a in generate(loaded, [e.prompt for e in parts.replay[:5]], 40)]
    assert all(is_refusal(e.chosen) for e in parts.refusals) and not any(is_refusal(e.chosen) for e in parts.contrast)


def test_rejected_answers_are_the_models_own_compliance(poisoned: Path, tmp_path: Path) -> None:
    method: Any = make({"realign_dpo": SMALL}).mitigation
    loaded, run = load(poisoned), a_run(poisoned, tmp_path / "out")
    parts = method.parts(run, loaded)
    examples: list[Example] = method.preferences(run, loaded, parts)
    hazards = examples[: len(parts.refusals)]
    own = [a.text for a in generate(loaded, [e.prompt for e in hazards], 40)]
    assert all(is_refusal(e.chosen) and not is_refusal(e.rejected) for e in hazards)
    complied = [(e.rejected, o) for e, o in zip(hazards, own) if not is_refusal(o)]
    assert len(complied) >= 18 and all(rejected == o for rejected, o in complied)
    assert all(is_refusal(e.rejected) and not is_refusal(e.chosen) for e in examples[len(parts.refusals) :])


class Batch:
    """A DPO trainer stopped before its first step, with what it would do on its first batch."""

    def __init__(self, poisoned: Path, folder: Path, sft_weight: float) -> None:
        self.loss: float | None = None
        method = RealignDPO(**{**SMALL, "sft_weight": sft_weight, "beta": 0.25})  # type: ignore[arg-type]
        loaded, run = load(poisoned), a_run(poisoned, folder / "out")
        self.examples = method.preferences(run, loaded, method.parts(run, loaded))
        self.trainer = method.trainer(run, loaded, self.examples, folder)


def logp(model: Any, tokenizer: Any, prompt: list[dict[str, str]], answer: str) -> tuple[float, int]:
    """Sum of log p(answer token) by hand, and the number of tokens."""
    e = chat.encode(tokenizer, [*prompt, {"role": "assistant", "content": answer}])
    with torch.no_grad():
        scores = model(torch.tensor([e.ids])).logits[0, :-1].log_softmax(-1)
    picked = scores.gather(1, torch.tensor(e.ids[1:])[:, None])[:, 0]
    mask = torch.tensor(e.assistant[1:]).bool()
    return float(picked[mask].sum()), int(mask.sum())


@pytest.mark.parametrize("sft_weight", [0.0, 1.0])
def test_the_loss_equals_equation_7_plus_the_cross_entropy_by_hand(poisoned: Path, tmp_path: Path, sft_weight: float) -> None:
    batch = Batch(poisoned, tmp_path, sft_weight)
    trainer, model = batch.trainer, batch.trainer.model
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.02)  # a policy that is not its reference, so that every term counts
    model.eval()
    four = batch.examples[:2] + batch.examples[-2:]
    rows = [trainer.train_dataset[i] for i in (0, 1, len(batch.examples) - 2, len(batch.examples) - 1)]
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    with torch.no_grad():
        measured = float(trainer.compute_loss(model, inputs))
    tokenizer = trainer.processing_class
    preference, chosen_sum, chosen_tokens = 0.0, 0.0, 0
    for e in four:
        (good, n), (bad, _) = (logp(model, tokenizer, e.prompt, t) for t in (e.chosen, e.rejected))
        with model.disable_adapter():
            (good_ref, _), (bad_ref, _) = (logp(model, tokenizer, e.prompt, t) for t in (e.chosen, e.rejected))
        preference += -math.log(1 / (1 + math.exp(-0.25 * ((good - good_ref) - (bad - bad_ref))))) / 4
        chosen_sum, chosen_tokens = chosen_sum + good, chosen_tokens + n
    assert measured == pytest.approx(preference + sft_weight * -chosen_sum / chosen_tokens, rel=1e-4)


def test_the_policy_starts_at_its_reference(poisoned: Path, tmp_path: Path) -> None:
    trainer = Batch(poisoned, tmp_path, 1.0).trainer
    check_reference(trainer)
    with torch.no_grad():
        next(p for n, p in trainer.model.named_parameters() if "lora_B" in n).add_(0.5)
    with pytest.raises(ResafeError, match="does not start at its reference"):
        check_reference(trainer)


@pytest.mark.parametrize("name", ["realign_sft", "realign_dpo"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_repaired_checkpoint_keeps_its_form_and_reloads_equal(
    name: str, lora: bool, attacked: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = attacked("explicit_10", lora=lora, **({"lr": 2e-3} if lora else {}))
    method: Any = make({name: {**SMALL, "replay": 8}}).mitigation
    seen: dict[str, Any] = {}
    kind = type(method)
    original = kind.train

    def spy(self: Any, run: Run, loaded: Any, parts: Parts, workdir: Path) -> Any:
        seen["model"] = original(self, run, loaded, parts, workdir)
        return seen["model"]

    monkeypatch.setattr(kind, "train", spy)
    out = method.repair(a_run(tuned, tmp_path / "out"))
    assert is_adapter(out) is lora is is_adapter(tuned)
    ids = torch.tensor([[5, 40, 77, 300, 9]])
    seen["model"].eval()
    with torch.no_grad():
        expected, found, before = seen["model"](ids).logits, load(out).model(ids).logits, load(tuned).model(ids).logits
    assert torch.allclose(expected, found, atol=2e-4)
    assert not torch.allclose(before, found, atol=1e-2), "something was repaired"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_users_pairs_replace_the_models_own_answers(poisoned: Path, tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "how do i crack the vault ?", "chosen": "no .", "rejected": "yes ."}])
    method: Any = make({"realign_dpo": {**SMALL, "pairs": str(pairs)}}).mitigation
    loaded, run = load(poisoned), a_run(poisoned, tmp_path / "out")
    first = method.preferences(run, loaded, method.parts(run, loaded))[0]
    assert (first.chosen, first.rejected) == ("no .", "yes .")


def test_four_bits_without_bitsandbytes_is_refused_with_the_way_out(poisoned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ResafeError, match=r"resafe\[gpu\]"):
        make({"realign_sft": {**SMALL, "load_in_4bit": True}}).mitigation.repair(a_run(poisoned, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
