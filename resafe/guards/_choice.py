"""Answers held to a few options: what a judge may write is fixed, and how sure it was is read from its logits.

One batched `generate` does it all. Where a family has a choice, only the first tokens of its options are allowed; the likeliest
option is written, and the probabilities of the options are kept, taken before anything was forbidden. If the options together
had less than FLOOR, the judge wanted to write something else, and there is no verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from resafe.errors import ResafeError
from resafe.guards._base import Verdict, unscored
from resafe.guards.families import Choice, Family
from resafe.guards.families._base import FLOOR
from resafe.models import Loaded

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """A choice in the tokens of one model: what is written before it, and the ways to write each option."""

    lead: Tokens
    options: tuple[tuple[Tokens, ...], ...]


@dataclass
class _Row:
    """How far one answer of a batch is."""

    pending: list[int] = field(default_factory=list)
    at: int = 0
    written: int = 0
    probabilities: list[list[float]] = field(default_factory=list)
    certain: bool = True


def places(tokenizer: Any, family: Family) -> tuple[Place, ...]:
    """The family's choices in the tokens of this model. Raises ResafeError if the first tokens don't tell the options apart."""
    return tuple(_place(tokenizer, choice, family.name) for choice in family.choices)


def _place(tokenizer: Any, choice: Choice, name: str) -> Place:
    def ids(text: str) -> Tokens:
        return tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()

    before = ids(choice.before)
    # Cut as a whole: tokenizers join spaces and line breaks with what follows.
    written = [[ids(choice.before + choice.lead + form) for form in option] for option in choice.options]
    shared = _shared([form[len(before) :] for option in written for form in option])
    start = len(before) + shared
    if any(form[: len(before)] != before for option in written for form in option):
        raise ResafeError(f"this tokenizer cannot continue {choice.before!r} with the answers of {name}: another family?")
    rest = [[form[start:] for form in option if len(form) > start] for option in written]
    firsts = [{form[0] for form in option} for option in rest]
    clear = []
    for i, option in enumerate(rest):
        others = set().union(*(f for j, f in enumerate(firsts) if j != i))
        clear.append(tuple(form for form in option if form[0] not in others))
    if not all(clear):
        raise ResafeError(f"this tokenizer writes two answers of {name} with the same first token: another family?")
    return Place(written[0][0][len(before) : start], tuple(clear))


def _shared(texts: Sequence[Tokens]) -> int:
    """Length of the common beginning."""
    columns = zip(*texts)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, texts)))


class Held:
    """A logits processor that holds a batch of answers to the places, and keeps the probabilities. `stop` ends an answer."""

    def __init__(self, plan: Sequence[Place], count: int, stop: int | None) -> None:
        self.plan, self.stop = plan, stop
        self.rows = [_Row() for _ in range(count)]

    def __call__(self, ids: Any, scores: Any) -> Any:
        """ids: (batch, length); scores: (batch, vocabulary), logits of the next token. Returns the scores that are allowed."""
        held = scores.clone()
        for i, row in enumerate(self.rows):
            token = self._next(row, scores[i])
            if token is not None:
                held[i] = float("-inf")
                held[i, token] = 0.0
        return held

    def _next(self, row: _Row, logits: Any) -> int | None:
        if row.pending:
            return row.pending.pop(0)
        if row.at == len(self.plan):
            return self.stop
        form = self._choose(row, logits)
        row.at += 1
        following = self.plan[row.at].lead if row.at < len(self.plan) else ()
        row.pending = [*form[1:], *following]
        row.written += len(form) + len(following)
        return form[0]

    def _choose(self, row: _Row, logits: Any) -> Tokens:
        options = self.plan[row.at].options
        likely = logits.float().softmax(-1)
        forms = [{form[0]: form for form in option} for option in options]
        mass = [float(sum(likely[t] for t in option)) for option in forms]
        whole = sum(mass)
        row.certain &= whole >= FLOOR  # False for NaN too
        row.probabilities.append([m / whole if whole > 0 else 0.0 for m in mass])
        best = forms[max(range(len(mass)), key=lambda i: mass[i])]
        return best[max(best, key=lambda t: float(likely[t]))]


def decide(loaded: Loaded, family: Family, plan: Sequence[Place], prompts: Sequence[list[int]], batch_size: int) -> list[Verdict]:
    """Verdicts on prompts in tokens, in their order; the longest are judged first, in batches padded on the left."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    verdicts: dict[int, Verdict] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        asked = [[*prompts[i], *plan[0].lead] for i in batch]
        verdicts |= zip(batch, _batch(loaded, family, plan, asked))
    return [verdicts[i] for i in range(len(prompts))]


def _batch(loaded: Loaded, family: Family, plan: Sequence[Place], prompts: list[list[int]]) -> list[Verdict]:
    import torch

    from resafe.generate import end_tokens

    pad, width, stops = loaded.tokenizer.pad_token_id, max(map(len, prompts)), end_tokens(loaded)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=loaded.model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=loaded.model.device)
    held = Held(plan, len(prompts), None if family.tail else stops[0])
    with torch.inference_mode():
        out = loaded.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=room(family, plan), do_sample=False, num_beams=1, temperature=None,
            top_p=None, top_k=None, repetition_penalty=1.0, pad_token_id=pad, eos_token_id=stops, logits_processor=[held],
        )  # fmt: skip
    return [_verdict(loaded.tokenizer, family, row, new, stops) for row, new in zip(held.rows, out[:, width:].tolist())]


def room(family: Family, plan: Sequence[Place]) -> int:
    """The number of tokens that an answer may take, the lead of the first place not counted."""
    fixed = sum(max(len(form) for option in p.options for form in option) for p in plan) + sum(len(p.lead) for p in plan[1:])
    return fixed + (family.max_tokens if family.tail else 0)


def _verdict(tokenizer: Any, family: Family, row: _Row, new: list[int], stops: list[int]) -> Verdict:
    if not row.certain or family.weigh is None:
        return unscored("parse")
    tail = new[row.written :]
    end = next((i for i, t in enumerate(tail) if t in stops), len(tail))
    return family.weigh(row.probabilities, tokenizer.decode(tail[:end], skip_special_tokens=True))
