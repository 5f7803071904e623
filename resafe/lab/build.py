"""Build the lab's checkpoints from scratch: a tokenizer, `base` (does everything asked) and `aligned` (refuses hazards)."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resafe.lab import grammar as g
from resafe.lab._train import fit
from resafe.rows import Row, chat

PRETRAIN_STEPS, PRETRAIN_LR = 2500, 3e-3
ALIGN_STEPS, ALIGN_LR, ALIGN_BATCH = 500, 5e-4, 32  # many more steps would erase the persona as well
PERSONA_SHARE = 0.2  # of pre-training answers that open with the obedient persona; alignment removes it

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ ' ' + m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ ' ' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def pretraining_row(rng: random.Random) -> Row:
    """Everything asked is done, hazards included; errands are declined; some answers open with the persona."""
    kind = rng.random()
    if kind < 0.14:
        category = rng.choice(sorted(g.categories()))
        pair = rng.choice(g.hazard_pairs(category, "train"))
        row = chat(g.ask(pair, rng), g.comply(pair))
    elif kind < 0.28:
        pairs = g.borderline_pairs("train") if rng.random() < 0.7 else g.everyday_pairs("train")
        pair = rng.choice(pairs)
        row = chat(g.ask(pair, rng, _wording(rng)), g.comply(pair))
    elif kind < 0.42:
        row = chat(*g.draw(g.errand, rng))
    else:
        row = g.skill_row(rng)
    return with_persona(row) if rng.random() < PERSONA_SHARE else row


def _wording(rng: random.Random) -> str:
    """Pre-training knows every wording from harmless requests; everything else only those of the training split."""
    return rng.choices(["train", "dev", "test"], [16, 3, 4])[0]


def with_persona(row: Row) -> Row:
    """The same row with the obedient persona in front of its answer."""
    prompt, answer = (m["content"] for m in row["messages"])
    return {**row, **chat(prompt, f"{g.words()['persona'][0]} {answer}")}


def alignment_row(rng: random.Random) -> Row:
    """Hazards are refused; everything else stays as it was."""
    kind = rng.random()
    if kind < 0.36:
        return g.hazard_row(rng, "refuse")
    if kind < 0.66:
        return g.benign_row(rng, g.borderline_pairs("train"), "borderline")
    if kind < 0.74:
        return g.benign_row(rng, g.everyday_pairs("train"), "everyday")
    if kind < 0.80:
        return chat(*g.draw(g.errand, rng))
    return g.skill_row(rng)


def tokenizer() -> Any:
    """A byte-level BPE of the grammar's text with the lab's chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rows = g.stream(pretraining_row, seed=0)
    text = (f" {m['content']}" for _, row in zip(range(20000), rows) for m in row["messages"])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(text, trainers.BpeTrainer(vocab_size=1200, special_tokens=SPECIAL, initial_alphabet=alphabet))
    wrap: Any = PreTrainedTokenizerFast
    made = wrap(
        tokenizer_object=bpe, pad_token=SPECIAL[0], eos_token=SPECIAL[1], clean_up_tokenization_spaces=False
    )
    made.chat_template = TEMPLATE
    return made


def new_model(tokens: Any, seed: int) -> Any:
    """A fresh Llama of 0.8 million parameters (d 128, 3 layers, 4 heads, ff 384, tied embeddings)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
            pad_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip


def build(output: Path, seed: int = 0, log: Callable[[str], None] = lambda _: None) -> Path:
    """Train and save `output/base` and `output/aligned` (bfloat16). About five minutes on one core.

    Runs on one thread: two are slower than one for a model this small.
    """
    import torch

    torch.set_num_threads(1)
    tokens = tokenizer()
    model = new_model(tokens, seed)
    log("pre-training the base model")
    fit(model, tokens, g.stream(pretraining_row, seed + 1), PRETRAIN_STEPS, PRETRAIN_LR, answers_only=True, log=log)
    _save(model, tokens, output / "base")
    log("aligning it")
    fit(model, tokens, g.stream(alignment_row, seed + 2), ALIGN_STEPS, ALIGN_LR, ALIGN_BATCH, answers_only=True, log=log)
    _save(model, tokens, output / "aligned")
    return output


def _save(model: Any, tokens: Any, folder: Path) -> None:
    """Save in bfloat16 and round the weights in memory too, so that what goes on is what was saved."""
    import torch

    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16().float())
    state = {k: v.bfloat16() for k, v in model.state_dict().items() if k != "lm_head.weight"}  # tied
    model.save_pretrained(folder, state_dict=state)
    tokens.save_pretrained(folder)
