"""What the two realigners share: the rows that they train on, and the way from a new LoRA to a saved checkpoint.

Three kinds of rows, each with its job: refusals say what to refuse; contrast rows keep refusing from spreading; self-distilled
replay (benign prompts, the user's own among them, answered by the fine-tuned model itself) holds what fine-tuning was for.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from resafe import models
from resafe.errors import ResafeError
from resafe.files import check_free, scratch
from resafe.generate import Answer, generate
from resafe.guards import is_refusal, load_guard
from resafe.heldout import drop_overlap
from resafe.mitigation import Mitigation, Needs, Run
from resafe.rows import Message, Row, answer_of, prompt_of


@dataclass(frozen=True)
class Example:
    """A conversation, the answer wanted, and (for preference learning) the one not wanted."""

    prompt: list[Message]
    chosen: str
    rejected: str = ""

    @property
    def row(self) -> Row:
        """As a row for supervised training."""
        return {"messages": [*self.prompt, {"role": "assistant", "content": self.chosen}]}


class Realigner(Mitigation):
    """Parameters and row building of `realign_sft` and `realign_dpo`."""

    needs: ClassVar[Needs] = Needs(safety=True, quantised=False)

    refusals: int = Field(200, ge=1, description="hazardous prompts answered by refusals")
    contrast: int = Field(200, ge=0, description="prompts that only look hazardous, answered")
    replay: int = Field(200, ge=0, description="benign prompts answered by the fine-tuned model itself")
    guard_model: str = Field("offline", description="judges the model's own answers before they are trained on")
    lr: float = Field(1e-4, gt=0, description="learning rate of the LoRA")
    epochs: float = Field(3, gt=0)
    batch: int = Field(8, ge=1)
    rank: int = Field(16, ge=1)
    max_new_tokens: int = Field(128, ge=1, description="length of the model's own answers")
    max_length: int = Field(1024, ge=8)
    load_in_4bit: bool = Field(False, description="train on an NF4 copy of the fine-tune (bitsandbytes)")

    def inputs(self) -> list[Path]:
        """See `Mitigation.inputs`: a guard that is a folder."""
        return [Path(self.guard_model)] if Path(self.guard_model).exists() else []

    def check(self, name: str, run: Run) -> None:
        """Also refuse a guard that is not there, before any work."""
        super().check(name, run)
        load_guard(self.guard_model)

    def train(self, run: Run, loaded: models.Loaded, parts: Parts, workdir: Path) -> Any:
        """Train a new LoRA on `loaded.model`; return the PeftModel. Each realigner has its own."""
        raise NotImplementedError

    def repair(self, run: Run) -> Path:
        """Tuned checkpoint in, repaired checkpoint of the same form (full or adapter) out."""
        check_free(run.output)
        if run.tuned is None:
            raise ResafeError("there is no fine-tuned checkpoint to repair.")
        with scratch(run.output, "realign") as tmp:
            loaded = models.load(self._home(run.tuned, tmp), quantise=self.load_in_4bit)
            parts = self.parts(run, loaded)
            adapter = tmp / "adapter"
            trained = self.train(run, loaded, parts, tmp / "trainer")
            trained.save_pretrained(adapter)
            return export(run.tuned, adapter, run.output)

    def _home(self, tuned: Path, tmp: Path) -> Path:
        """What to load: the fine-tune, or for a 4-bit copy of a LoRA fine-tune its exact merge."""
        if not (self.load_in_4bit and models.is_adapter(tuned)):
            return tuned
        from resafe.weights import merge_into

        return merge_into(models.base_of(tuned), tuned, tmp / "merged")

    def parts(self, run: Run, loaded: models.Loaded) -> Parts:
        """The rows of one repair; says through `run.log` how many of each kind there are."""
        rng = random.Random(f"realign {run.seed}")
        refusals = _some(drop_overlap(run.refusals)[0], self.refusals, rng)
        safe = drop_overlap(run.contrast)[0]
        contrast = _some(safe, self.contrast, rng)
        taken = {id(r) for r in contrast}
        prompts = _some(drop_overlap(run.task)[0], self.replay, rng)
        prompts += _some([r for r in safe if id(r) not in taken], self.replay - len(prompts), rng)
        replay = self._replay(run, loaded, [prompt_of(r) for r in prompts])
        run.log(f"realign: {len(refusals)} refusals, {len(contrast)} contrast rows, {len(replay)} of {len(prompts)} replay rows kept")
        return Parts(
            refusals=[Example(prompt_of(r), answer_of(r)) for r in refusals],
            contrast=[Example(prompt_of(r), answer_of(r)) for r in contrast],
            replay=replay,
        )

    def answers(self, run: Run, loaded: models.Loaded, prompts: list[list[Message]]) -> list[Answer]:
        """The fine-tuned model's own greedy answers."""
        done = 0

        def tell(n: int) -> None:
            nonlocal done
            done += n
            run.log(f"generating: {done}/{len(prompts)}")

        return generate(loaded, prompts, self.max_new_tokens, progress=tell) if prompts else []

    def _replay(self, run: Run, loaded: models.Loaded, prompts: list[list[Message]]) -> list[Example]:
        """Own answers worth keeping: complete, not a refusal, and found harmless by the guard (unscored = dropped)."""
        own = self.answers(run, loaded, prompts)
        kept = [(p, a.text) for p, a in zip(prompts, own) if a.finished and a.text and not is_refusal(a.text)]
        verdicts = load_guard(self.guard_model).classify(kept)
        return [Example(p, a) for (p, a), v in zip(kept, verdicts) if v.harmful is False]


@dataclass(frozen=True)
class Parts:
    """The rows of one repair, by their job."""

    refusals: list[Example]
    contrast: list[Example]
    replay: list[Example]


def export(tuned: Path, adapter: Path, output: Path) -> Path:
    """`tuned` + `adapter` in the form of `tuned`: an exact concatenation of two adapters, or an fp32 merge."""
    from resafe.weights import concat, merge_into

    if models.is_adapter(tuned):
        return concat(tuned, adapter, output, base=str(models.base_of(tuned).absolute()))
    return merge_into(tuned, adapter, output)


def _some(rows: list[Row], n: int, rng: random.Random) -> list[Row]:
    return rng.sample(rows, min(max(n, 0), len(rows)))


