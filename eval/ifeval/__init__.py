"""IFEval: whether a response follows the instructions of its prompt. Zhou et al. 2023, https://arxiv.org/abs/2311.07911

A row has `instruction_id_list` and `kwargs`, as in the published input_data.jsonl. Strict: the response as it is.
Loose: at least one of eight versions of it, without its first line, its last, its asterisks, or several of these.

Three instructions need language detection (the extra `ifeval`). Without it a prompt that has one of them is unscored
even where another of its instructions is already broken: scoring only the failures would lower the rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resafe.errors import suggest
from resafe.eval.ifeval.checkers import CHECKERS, RELATIONS
from resafe.eval.ifeval.text import has_language_detection

UNSCORED = "language detection is not installed: pip install 'resafe[ifeval]'"


@dataclass(frozen=True)
class Followed:
    """For each instruction of a prompt, in its order, (strict, loose); `unscored` is the reason for there being none."""

    each: tuple[tuple[bool, bool], ...] = ()
    unscored: str = ""

    @property
    def strict(self) -> bool:
        """Prompt-level: every instruction followed by the response as it is."""
        return not self.unscored and all(strict for strict, _ in self.each)

    @property
    def loose(self) -> bool:
        """Prompt-level: every instruction followed by some version of the response."""
        return not self.unscored and all(loose for _, loose in self.each)


def follow(response: str, row: Mapping[str, Any]) -> Followed:
    """Check the response to a row that `unfit` has nothing to say about. A blank response follows nothing."""
    asked = list(zip(row["instruction_id_list"], row["kwargs"]))
    if any(CHECKERS[name].language for name, _ in asked) and not has_language_detection():
        return Followed(unscored=UNSCORED)
    return Followed(tuple(_followed(name, kwargs, response) for name, kwargs in asked))


def _followed(name: str, kwargs: Mapping[str, Any], response: str) -> tuple[bool, bool]:
    follows, needs, _ = CHECKERS[name]
    given = {key: kwargs[key] for key in needs}
    verdicts = (bool(text.strip()) and follows(text, **given) for text in versions(response))
    strict = next(verdicts)
    return strict, strict or any(verdicts)


def versions(response: str) -> list[str]:
    """The response, then its loose versions."""
    lines = response.split("\n")
    parts = [response, *("\n".join(kept).strip() for kept in (lines[1:], lines[:-1], lines[1:-1]))]
    return parts + [part.replace("*", "") for part in parts]


def unfit(row: Mapping[str, Any]) -> str:
    """Why a row cannot be checked; empty when it can."""
    names, kwargs = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(names, list) or not isinstance(kwargs, list) or not names or len(names) != len(kwargs):
        return "'instruction_id_list' and 'kwargs' must be lists of the same length"
    return next(filter(None, map(_unfit, names, kwargs)), "")


def _unfit(name: Any, kwargs: Any) -> str:
    if name not in CHECKERS:
        return f"there is no instruction '{name}'. {suggest(str(name), CHECKERS)}".rstrip(". ")
    for key, kind in CHECKERS[name].needs.items():
        value = kwargs.get(key) if isinstance(kwargs, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{name} needs '{key}' ({kind.__name__}) among its kwargs"
        if key.endswith("relation") and value not in RELATIONS:
            return f"{key} of {name} is '{value}', not one of {', '.join(RELATIONS)}"
    return ""
