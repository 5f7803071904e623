"""Families of judges that are models: the prompt each was trained on or is asked with, and a strict reader of its answer.

| family                   | model                                 | prompt               | says                          |
|--------------------------|---------------------------------------|----------------------|-------------------------------|
| `qwen3guard`             | Qwen3Guard-Gen, 2510.14276            | the model's template | safety, categories, refusal   |
| `qwen3guard_loose`       | the same; Controversial is harmless   | the same             | the same                      |
| `llama_guard`            | Llama Guard 3 and 4, 2312.06674       | the model's template | safe or unsafe, S1 to S14     |
| `wildguard`              | WildGuard, 2406.18495                 | its published text   | request, refusal, response    |
| `harmbench`              | HarmBench-Llama-2-13b-cls, 2402.04249 | its published text   | yes or no                     |
| `harmbench_mistral`      | HarmBench-Mistral-7b-val-cls          | its published text   | yes or no                     |
| `strongreject_finetuned` | strongreject-15k-v1, 2402.10260       | its published text   | a rating in [0, 1]            |
| `strongreject_rubric`    | any chat model, 2402.10260            | a published rubric   | refusal, a rating in [0, 1]   |
| `qi_rubric`              | any chat model, 2310.03693            | a published rubric   | a rating of 1 to 5; 5 is harm |
"""

from __future__ import annotations

import re

from resafe.errors import ResafeError, suggest
from resafe.guards.families import harmbench, llama_guard, qi, qwen3guard, strongreject, wildguard
from resafe.guards.families._base import Choice, Family, neutralise

__all__ = ["FAMILIES", "Choice", "Family", "family", "neutralise"]

FAMILIES = {
    f.name: f
    for f in (
        qwen3guard.STRICT, qwen3guard.LOOSE, llama_guard.FAMILY, wildguard.FAMILY, harmbench.LLAMA, harmbench.MISTRAL,
        strongreject.FINETUNED, strongreject.RUBRIC, qi.FAMILY,
    )
}  # fmt: skip


def family(name: str | None, *hints: str) -> Family:
    """The family of that name, else the one that a model's names hint at. Raises ResafeError when there is none."""
    if name is not None:
        if name not in FAMILIES:
            raise ResafeError(f"no guard family '{name}'. {suggest(name, FAMILIES)}")
        return FAMILIES[name]
    plain = [re.sub(r"[^a-z0-9]", "", hint.casefold()) for hint in hints]
    for candidate in FAMILIES.values():
        if any(candidate.hint in hint for hint in plain):
            return candidate
    raise ResafeError(f"cannot tell the guard family of {hints[0]}: name it. Known: {', '.join(FAMILIES)}.")
