"""A handful of short conversations of different lengths."""

from __future__ import annotations

from resafe.rows import chat

ROWS = [
    chat("repeat the word dog", "dog dog"),
    chat("what is the opposite of hot", "cold it is , i think"),
    chat("list two things", "one and two"),
    chat("say yes", "yes"),
    chat("count to four please", "one two three four"),
]
