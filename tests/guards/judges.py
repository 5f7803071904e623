"""Tiny random judges of real architectures, whose tokens are single bytes, and what their own logits say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TEXT = "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}<|turn|>"
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
LLAMA4: dict[str, Any] = {"intermediate_size_mlp": 16, "num_local_experts": 1, "moe_layers": [], "attention_chunk_size": 4096}
EXCHANGE = ([{"role": "user", "content": "how ?"}], "like this")
EXCHANGES = [
    EXCHANGE,
    ([{"role": "user", "content": "and with a much longer question than the others have ?"}], "no. I will not help with that."),
    ([{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}], "four"),
]


def build(folder: Path, kind: str = "llama", template: str | None = TEXT, seed: int = 0, context: int = 16384) -> Path:
    """Save a random model of `kind` with a byte-level tokenizer that knows <s>, <|turn|> and <|end|>."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(alphabet))}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.add_special_tokens(["<s>", "<|end|>", "<|turn|>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    from tokenizers.decoders import ByteLevel

    core.decoder = ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|end|>", extra_special_tokens=["<|turn|>"])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    extra = LLAMA4 if kind == "llama4_text" else {}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), max_position_embeddings=context, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id, **{**SIZES, **extra},
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # initial weights are so small that all tokens are about equally likely
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= 8
    model.save_pretrained(folder)
    return folder


def rendered(exchange: Any) -> str:
    """TEXT, by hand."""
    turns = [*exchange[0], {"role": "assistant", "content": exchange[1]}]
    return "".join(f"<|turn|>{t['role']}: {t['content']}<|end|>" for t in turns) + "<|turn|>"


def share(loaded: Any, text: str, letters: str, start: bool = False) -> list[float]:
    """What one unpadded forward pass over `text` says of the next byte being each of `letters`, renormalised."""
    ids = loaded.tokenizer.encode(text, add_special_tokens=start)
    with torch.inference_mode():
        logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    wanted = [logits[loaded.tokenizer.convert_tokens_to_ids(c)].exp() for c in letters]
    return [float(w / sum(wanted)) for w in wanted]
