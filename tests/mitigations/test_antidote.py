"""Antidote: the pruned entries by brute force, on the fine-tuned model's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from resafe.errors import ResafeError
from resafe.generate import Answer
from resafe.mitigation import Run
from resafe.mitigations import make
from resafe.mitigations.antidote import harmful_entries
from resafe.rows import Message
from resafe.rows import chat as row
from resafe.sensitivity import InputMoment
from resafe.weights import merge_into
from tests.mitigations.twins import BENIGN, KINDS, SAFE, inputs, maps, pair, repaired
from tests.weights.models import logits, tensors

REPLY = "step one PLACEHOLDER"
ANSWERED = [row(r["messages"][0]["content"], REPLY) for r in SAFE[1:]]


@pytest.fixture(autouse=True)
def replies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fine-tune refuses the first prompt and answers all others."""

    def generate(loaded: Any, asked: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Answer]:
        first = SAFE[0]["messages"][0]["content"]
        return [Answer("I can't help with that." if a[-1]["content"] == first else REPLY) for a in asked]

    monkeypatch.setattr("resafe.generate.generate", generate)


def brute(d: torch.Tensor, x: torch.Tensor, share: float) -> torch.Tensor:
    """True for the largest |D_ij| ||x_j|| of each row, one entry after the other."""
    found = torch.zeros_like(d, dtype=torch.bool)
    for i in range(len(d)):
        scores = [(abs(float(d[i, j])) * float(x[:, j].norm()), j) for j in range(d.shape[1])]
        for _, j in sorted(scores, reverse=True)[: int(share * d.shape[1] + 1e-9)]:
            found[i, j] = True
    return found


def test_entries_are_those_of_the_largest_scores_less_the_benign_ones() -> None:
    torch.manual_seed(0)
    d, x, y = torch.randn(8, 8), torch.randn(5, 8), torch.randn(7, 8)
    harmful, benign = InputMoment(x.double().square().sum(0), 5), InputMoment(y.double().square().sum(0), 7)
    assert torch.equal(harmful_entries(d, harmful, None, 0.25, 0), brute(d, x, 0.25))
    assert torch.equal(harmful_entries(d, harmful, benign, 0.5, 0.25), brute(d, x, 0.5) & ~brute(d, y, 0.25))


@pytest.mark.parametrize("kind", KINDS)
def test_the_papers_form_zeroes_the_top_share_of_every_row(kind: str, aligned: Path, tmp_path: Path) -> None:
    _, tuned = pair(kind, tmp_path, aligned)
    out = maps(tensors(repaired("antidote:share=0.2", tmp_path / "aligned", tuned, tmp_path / "out")))
    f, x = maps(tensors(tuned)), inputs(tuned, ANSWERED)
    for name in f:
        if name in x:
            assert torch.equal(out[name], torch.where(brute(f[name], x[name], 0.2), 0, f[name])), name
        else:
            assert torch.equal(out[name], f[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_other_form_takes_the_update_back_and_spares_benign_entries(kind: str, aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair(kind, tmp_path, aligned)
    out = maps(tensors(repaired("antidote:share=0.4,action=aligned,keep=0.2", before, tuned, tmp_path / "out", task=BENIGN)))
    a, f, x, y = maps(tensors(before)), maps(tensors(tuned)), inputs(tuned, ANSWERED), inputs(tuned, BENIGN)
    for name in x:
        w, v = f[name], a[name]
        spared = brute(w - v, y[name], 0.2) if name in y else torch.zeros_like(w, dtype=torch.bool)
        assert torch.equal(out[name], torch.where(brute(w - v, x[name], 0.4) & ~spared, v, w)), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_is_merged_into_its_own_base_first(kind: str, aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair(kind, tmp_path, aligned, lora=True)
    merged = merge_into(before, tuned, tmp_path / "merged")
    full = repaired("antidote", before, merged, tmp_path / "full")
    mitigation = make("antidote").mitigation
    out = mitigation.repair(Run(output=tmp_path / "out", tuned=tuned, refusals=SAFE))
    assert torch.equal(logits(out), logits(full)) and not torch.allclose(logits(out), logits(merged))


def test_a_share_of_0_changes_nothing(aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair("gpt2", tmp_path, aligned)
    for spec in ("antidote:share=0", "antidote:share=0,action=aligned", "antidote:share=0.5,keep=1"):
        out = repaired(spec, before, tuned, tmp_path / str(len(list(tmp_path.iterdir()))), contrast=BENIGN)
        assert torch.equal(logits(out), logits(tuned))


def test_a_fine_tune_that_refuses_everything_has_nothing_to_prune_by(aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair("llama", tmp_path, aligned)
    with pytest.raises(ResafeError, match="answers none of 1 hazardous prompts"):
        repaired("antidote", before, tuned, tmp_path / "out", refusals=SAFE[:1])


def test_what_an_action_lacks_is_refused(tmp_path: Path) -> None:
    run = Run(output=tmp_path / "out", refusals=SAFE)
    with pytest.raises(ResafeError, match="action=aligned needs the model before fine-tuning"):
        make("antidote:action=aligned").mitigation.check("antidote", run)
    with pytest.raises(ResafeError, match="keep needs benign rows"):
        make("antidote:keep=0.1").mitigation.check("antidote", run)
