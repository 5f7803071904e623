"""Which tensor of one model is which of another: by name, never by position."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from resafe.errors import ResafeError
from resafe.weights.checkpoint import Checkpoint, is_embedding, is_head

BLOCK = re.compile(r"(?P<stack>.*?)\.(?P<number>\d+)\.")  # of a stack of blocks: its name, and which of them
FILES = ("tokenizer.json", "vocab.json", "vocab.txt")  # that list the tokens; vocab.json and .txt are of older models


def translate(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Each of `names` that `known` holds, with its name there.

    Some checkpoints leave out the leading part of all names (`h.0...` for `transformer.h.0...`). Where nothing matches as
    it is, one leading part is added or removed, throughout or not at all.
    """
    names = list(names)
    options = [{n: n for n in names if n in known}]
    if not options[0]:
        for part in sorted({n.split(".")[0] for n in known}):
            options.append({n: f"{part}.{n}" for n in names if f"{part}.{n}" in known})
        for part in sorted({n.split(".")[0] for n in names}):
            cut = {n: n.removeprefix(f"{part}.") for n in names}
            options.append({n: short for n, short in cut.items() if short != n and short in known})
    return max(options, key=len)


def counterparts(names: Iterable[str], model: Checkpoint) -> dict[str, str]:
    """`translate` into `model`; where its head is stored as the embedding (tied), that is where the head is found."""
    names = list(names)
    found = translate(names, model.names())
    for name in names:
        if name not in found and model.embedding and is_head(name):
            found[name] = model.head or model.embedding
    return found


class Depths:
    """How deep in a model a tensor sits, by its name: 0 in the first block (and for embeddings), 1 in the last (and for what follows)."""

    def __init__(self, names: Iterable[str]) -> None:
        self._last: dict[str, int] = {}
        for found in filter(None, map(BLOCK.match, names)):
            self._last[found["stack"]] = max(int(found["number"]), self._last.get(found["stack"], 0))

    def __call__(self, name: str) -> float:
        """The depth of `name`, in [0, 1]; blocks in between are evenly spaced."""
        found = BLOCK.match(name)
        if found is None:
            return 0.0 if is_embedding(name) else 1.0
        last = self._last.get(found["stack"], 0)
        return int(found["number"]) / last if last else 0.0


def token_file(one: Path, other: Path) -> str | None:
    """The first of FILES that both models have."""
    return next((f for f in FILES if (one / f).is_file() and (other / f).is_file()), None)


def check_tokenizers(one: Path, other: Path) -> None:
    """Refuse two models whose ids mean different tokens (added tokens may be renamed).

    By their `token_file`; models that have none in common are not judged.
    """
    file = token_file(one, other)
    if file is None:
        return
    ours, theirs = _tokens(one / file), _tokens(other / file)
    wrong = [i for i in sorted(ours.keys() & theirs.keys()) if ours[i] != theirs[i]]
    if wrong:
        i = wrong[0]
        raise ResafeError(
            f"the tokenizers of {one} and {other} differ: {len(wrong)} ids, such as {i} ({ours[i]!r} and {theirs[i]!r}). "
            "Weights can be combined only where both models read the same tokens."
        )


def _tokens(file: Path) -> dict[int, str]:
    try:
        if file.name == "vocab.txt":
            return dict(enumerate(file.read_text(encoding="utf-8").splitlines()))
        content = json.loads(file.read_text(encoding="utf-8"))
        if file.name == "vocab.json":
            return {int(i): str(token) for token, i in content.items()}
        return _of_tokenizer(content)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ResafeError(f"{file} cannot be read ({type(error).__name__}: {error}).") from None


def _of_tokenizer(content: dict[str, Any]) -> dict[int, str]:
    """The vocabulary in a tokenizer.json, without added tokens."""
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        tokens = {int(i): str(token) for token, i in vocabulary.items()}
    else:  # Unigram: a list of [token, score]
        tokens = {i: str(pair[0]) for i, pair in enumerate(vocabulary)}
    added = {int(token["id"]) for token in content.get("added_tokens", [])}
    return {i: token for i, token in tokens.items() if i not in added}
