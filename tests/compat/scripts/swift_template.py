"""Somebody's ms-swift plugin: the lab model's chat template in ms-swift's own notation."""

from swift.template import TemplateMeta, register_template

register_template(
    TemplateMeta(
        "lab", prefix=[], prompt=["<|user|> {{QUERY}}<|end|><|assistant|>"], chat_sep=["<|end|>"], suffix=["<|end|>"],
        system_prefix=["<|system|> {{SYSTEM}}<|end|>"],
    )
)  # fmt: skip
