"""A tiny random model on disk goes through the whole evaluator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resafe.eval import Results, compare, evaluate

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two random one-layer Llamas with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({w: i for i, w in enumerate(words)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), Decoder()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    made = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        ids: dict[str, Any] = {"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        made[seed] = tmp_path_factory.mktemp("models") / f"model{seed}"
        LlamaForCausalLM(LlamaConfig(**sizes, **ids)).save_pretrained(made[seed])
        fast.save_pretrained(made[seed])
    return made


def test_folders_are_evaluated_and_compared(models: dict[int, Path], tmp_path: Path) -> None:
    entry = {"attack": "a", "mitigation": "m", "overlap": {"other": ["q"]}}
    (models[1] / "resafe.json").write_text(json.dumps(entry))
    found = evaluate(
        [models[0], str(models[1])], ["lab_harm", "lab_note"], limit=4, output=tmp_path / "out", batch_size=3
    )
    assert found.targets == ["model0", "model1"] and found.labels("model1") == ("a", "m", None)
    row = found.row("model0", "lab_harm", "nonrefusal_rate", "rules")
    assert row is not None and (row["value"], row["n"]) == (1.0, 4)
    assert len(found.meta["targets"]["model0"]["template"]) == 12
    differences = compare(Results.load(tmp_path / "out"), "model0")
    assert {r["suite"] for r in differences} == {"lab_harm", "lab_note"} and all(r["n"] == 4 for r in differences)


def test_evaluating_twice_gives_the_same_verdicts(models: dict[int, Path]) -> None:
    one, two = (evaluate([models[0]], ["lab_skills"], limit=6, batch_size=b) for b in (6, 2))
    assert one.items == two.items
