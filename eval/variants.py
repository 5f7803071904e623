"""Variants: other ways of putting a suite's prompts to a model - a begun answer, a system prompt, sampled decoding.

`prefill` in a variant is what an answer opens with where the suite does not bring an opening for each prompt (its `target`
column). A variant is described in YAML, as those in variants.yaml are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from resafe import described
from resafe.backends import GREEDY, Sampling
from resafe.errors import ResafeError, suggest
from resafe.eval.suite import Case, LoadedSuite

SHIPPED = Path(__file__).parent / "variants.yaml"
Kind = Literal["harmful", "benign", "utility"]


class Variant(BaseModel):
    """One way of asking; what is left out stays as in the suite."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(pattern=r"^[\w.-]+$")
    about: str = ""
    kinds: tuple[Kind, ...] = Field(("harmful", "benign"), min_length=1)  # of the suites that it applies to
    system: str = ""
    prefill: str = ""
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    samples: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _drawn(self) -> Variant:
        if self.samples > 1 and not self.temperature:
            raise ValueError("samples at temperature 0 are all the same answer: set a temperature")
        return self


def names() -> list[str]:
    """The shipped variants."""
    return list(_described(SHIPPED))


def load_variants(asked: Sequence[str | Path]) -> list[Variant]:
    """Shipped variants by name, and all that a YAML file describes (name -> keys). Raises ResafeError for others."""
    found: list[Variant] = []
    for item in asked:
        if str(item).endswith((".yaml", ".yml")):
            found += _described(Path(item)).values()
        elif str(item) in (shipped := _described(SHIPPED)):
            found.append(shipped[str(item)])
        else:
            raise ResafeError(f"no variant is named '{item}'. {suggest(str(item), shipped)} A path to a .yaml file works too.")
    if len({v.name for v in found}) < len(found):
        raise ResafeError("two variants have the same name: name each once.")
    return found


def _described(file: Path) -> dict[str, Variant]:
    value = described.read(file, "variants file")
    if not isinstance(value, dict) or not all(isinstance(keys, dict) for keys in value.values()):
        raise ResafeError(f"{file} must map names of variants to their keys, such as 'mine: {{prefill: Sure}}'.")
    return {str(name): _variant(file, str(name), keys) for name, keys in value.items()}


def _variant(file: Path, name: str, keys: dict[str, Any]) -> Variant:
    if "name" in keys:
        raise ResafeError(f"{file}: unknown key '{name}.name': a variant is called by the key before the colon, here '{name}'.")
    try:
        return Variant.model_validate({**keys, "name": name})
    except ValidationError as error:
        raise ResafeError(f"{file}: {described.fault(error, {1: set(Variant.model_fields) - {'name'}}, name)}") from None


def varied(suite: LoadedSuite, variant: Variant, seed: int = 0) -> LoadedSuite:
    """The suite asked in another way, called SUITE+VARIANT; `seed` decides what is sampled."""
    description = suite.suite.model_copy(update={"name": f"{suite.name}+{variant.name}"})
    sampling = Sampling(variant.temperature, variant.top_p, seed) if variant.temperature else GREEDY
    cases = [_asked(c, variant) for c in suite.cases]
    return replace(suite, suite=description, cases=cases, of=suite.name, variant=variant.name, sampling=sampling, samples=variant.samples)


def _asked(case: Case, variant: Variant) -> Case:
    others = [m for m in case.messages if m["role"] != "system"]
    messages = [{"role": "system", "content": variant.system}, *others] if variant.system else case.messages
    return replace(case, messages=messages, prefill=(case.target or variant.prefill) if variant.prefill else "")
