"""Variants: other ways of putting a suite's prompts to a model - a begun answer, a system prompt, sampled decoding.

`prefill` in a variant is what an answer opens with where the suite does not bring an opening for each prompt (its `target`
column). A variant is described in YAML, as those in variants.yaml are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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
    kinds: tuple[Kind, ...] = ("harmful", "benign")  # of the suites that it applies to
    system: str = ""
    prefill: str = ""
    temperature: float = Field(0.0, ge=0)
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
    if not file.is_file():
        raise ResafeError(f"no such variants file: {file}")
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or not all(isinstance(keys, dict) for keys in value.values()):
            raise ResafeError(f"{file} must map names of variants to their keys, such as 'mine: {{prefill: Sure}}'.")
        return {str(name): Variant.model_validate({**keys, "name": str(name)}) for name, keys in value.items()}
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        near = f" {suggest(where, Variant.model_fields)}" if where else ""
        raise ResafeError(f"{file}: {where}: {first['msg']}.{near}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ResafeError(f"{file} cannot be read as a YAML file of variants: {' '.join(str(error).split())}") from None


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
