"""What a recipe may say, checked before anything runs; unknown keys are refused with the nearest known one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from resafe import described
from resafe.errors import ResafeError
from resafe.eval.variants import load_variants
from resafe.mitigations import stack
from resafe.sft import SFTSettings


class Attack(BaseModel):
    """One fine-tuning run: its rows and how they are trained on. `lab:NAME` stands for a data set of the lab."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    data: str
    heldout: str | None = None
    train: SFTSettings = SFTSettings()


class Recipe(BaseModel):
    """model x attacks x mitigations x seeds, measured on suites."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(pattern=r"^[\w.-]+$")
    description: str = ""
    model: str
    safety: str | None = None
    attacks: dict[str, Attack] = Field(min_length=1)
    mitigations: dict[str, list[str | dict[str, Any]]] = Field(min_length=1)
    suites: list[str] = Field(min_length=1)
    variants: list[str] = []
    judges: list[str] | None = None
    limit: int | None = Field(None, ge=1)
    seeds: list[int] = Field(default=[0], min_length=1)

    @field_validator("attacks")
    @classmethod
    def _not_none(cls, value: dict[str, Attack]) -> dict[str, Attack]:
        if "none" in value:
            raise ValueError("'none' is the model before fine-tuning; call the attack something else")
        return value

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("every seed may be named once")
        return value

    @field_validator("variants")
    @classmethod
    def _described(cls, value: list[str]) -> list[str]:
        load_variants(value)
        return value

    @field_validator("mitigations")
    @classmethod
    def _known(cls, value: dict[str, list[str | dict[str, Any]]]) -> dict[str, list[str | dict[str, Any]]]:
        for specs in value.values():
            stack(specs)
        if "none" in value and value["none"]:
            raise ValueError("'none' is the fine-tune without mitigation; it takes an empty list")
        return {"none": [], **value}


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe. Raises ResafeError with the file, the key and the way out."""
    file = Path(path)
    if not file.is_file():
        raise ResafeError(f"no such recipe: {file}. Shipped recipes: {', '.join(shipped())}.")
    value = described.read(file, "recipe")
    if not isinstance(value, dict):
        raise ResafeError(f"{file} is not a recipe: a mapping with the keys {', '.join(Recipe.model_fields)} is expected.")
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        known = {1: Recipe.model_fields, 3: Attack.model_fields, 4: SFTSettings.model_fields}
        raise ResafeError(f"{file}: {described.fault(error, known)}") from None


def shipped() -> list[str]:
    """Recipes that come with the package, as paths."""
    return sorted(str(p) for p in Path(__file__).resolve().parent.rglob("*.yaml"))
