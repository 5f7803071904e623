"""Add back the direction from an unaligned model to the aligned one: safety as a task vector.

RESTA, Bhardwaj et al. 2024, arXiv 2402.11746; DARE, Yu et al. 2023, arXiv 2311.03099

W = W_aligned + DARE(W_tuned - W_aligned) + strength (W_aligned - W_unaligned). The unaligned model is the aligned one after
fine-tuning on harmful data, not the pre-trained base; `unaligned=base` takes the base all the same, as a weaker proxy that needs no
harmful data. `unaligned` may be a LoRA adapter of the aligned model: then a LoRA fine-tune stays an adapter, exactly. With
`unaligned_data` that adapter is trained here, on the user's own rows of harmful answers, and kept in the cache (readable by the
user only), never beside the output.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from resafe.errors import ResafeError
from resafe.files import check_free
from resafe.mitigation import Mitigation, Needs, Run
from resafe.mitigations._updates import adapter_of
from resafe.models import base_of, is_adapter

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from resafe.weights import Twin


Vector = Callable[["Twin", Any], Any]  # a weight (which rows of it), W_aligned -> W_aligned - W_unaligned, or None


class Resta(Mitigation):
    """`unaligned` is a folder (full checkpoint or adapter of the aligned model), or "base" with --base; or it is trained from `unaligned_data`."""

    needs: ClassVar[Needs] = Needs(aligned=True)
    dose: ClassVar[tuple[str, tuple[float, ...]]] = ("strength", (0.1, 0.2, 0.35, 0.5, 0.75, 1.0))

    unaligned: str = Field("base", description="folder of the model after harmful fine-tuning, or 'base': the weaker proxy")
    unaligned_data: str | None = Field(None, description="JSONL of prompts with harmful answers: the unaligned model is a LoRA of the aligned one, trained on them here")
    epochs: float = Field(5, gt=0, description="passes over unaligned_data")
    lr: float = Field(2e-4, gt=0, description="learning rate of that training")
    strength: float = Field(1.0, allow_inf_nan=False, description="how much of the safety vector is added")
    drop: float = Field(0.0, ge=0, lt=1, description="DARE: share of the fine-tuning update's entries that are dropped, the rest rescaled; full checkpoints only")

    def check(self, name: str, run: Run) -> None:
        """Also refuse an unaligned model that is not there, and DARE on an adapter."""
        super().check(name, run)
        given = self.unaligned != "base"
        if given and self.unaligned_data is not None:
            raise ResafeError(f"{name}: unaligned and unaligned_data both say what the unaligned model is: set one.")
        if self.unaligned_data is not None and not Path(self.unaligned_data).is_file():
            raise ResafeError(f"{name}: no such file: {self.unaligned_data}")
        if not given and self.unaligned_data is None and run.base is None:
            raise ResafeError(f"{name} needs an unaligned model: name its folder ({name}:unaligned=FOLDER) or rows to train it on ({name}:unaligned_data=FILE), or the model before alignment with --base.")
        if given and not Path(self.unaligned).is_dir():
            raise ResafeError(f"{name}: no such model folder: {self.unaligned}")
        if run.tuned is not None and is_adapter(run.tuned):
            if self.drop:
                raise ResafeError(f"{name}: drop takes entries out of the update, which is then no LoRA any more: merge the adapter first, or use drop=0.")
            if self.unaligned_data is None and not (given and is_adapter(Path(self.unaligned))):
                raise ResafeError(f"{name}: a LoRA fine-tune needs an unaligned model that is a LoRA of the same aligned model; or merge the adapter first.")

    def repair(self, run: Run) -> Path:
        """Write the repaired checkpoint or adapter to `run.output`."""
        check_free(run.output)
        tuned, aligned = run.tuned, run.aligned
        if tuned is None or aligned is None:
            raise ResafeError("resta needs the fine-tuned model and the one before fine-tuning (--aligned).")
        if self.unaligned_data is not None:
            away = _trained(run, aligned, Path(self.unaligned_data), self.epochs, self.lr)
        elif self.unaligned != "base":
            away = Path(self.unaligned)
        elif run.base is not None:
            away = run.base
            run.log("resta: the pre-trained base stands in for an unaligned model; expect less of it")
        else:
            raise ResafeError("resta needs an unaligned model, rows to train it on, or the model before alignment (--base).")
        return self._adapter(run, tuned, aligned, away) if is_adapter(tuned) else self._checkpoint(run, tuned, aligned, away)

    def _adapter(self, run: Run, tuned: Path, aligned: Path, unaligned: Path) -> Path:
        """dW = dW_tuned - strength dW_unaligned, since both are updates of the aligned model."""
        import tempfile

        from resafe.weights import concat, rescale

        home = str(base_of(tuned).absolute())
        run.output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=run.output.absolute().parent, prefix=f".{run.output.name}.parts-") as parts:
            away = rescale(adapter_of(unaligned, aligned), -self.strength, Path(parts) / "away", base=home)
            return concat(adapter_of(tuned, aligned), away, run.output, base=home)

    def _checkpoint(self, run: Run, tuned: Path, aligned: Path, unaligned: Path) -> Path:
        from resafe.weights import Checkpoint, Pair, write_checkpoint

        pair = Pair(Checkpoint(tuned), Checkpoint(aligned), run.log)
        vector = _vector(unaligned, aligned)

        def rule(twin: Twin, ours: Tensor, theirs: Tensor) -> Tensor:
            made = ours if not self.drop else theirs + dare(ours - theirs, self.drop, _generator(run.seed, twin.name))
            safety = vector(twin, theirs)
            return made if safety is None else made.add(safety, alpha=self.strength)

        blocks = not self.drop and not is_adapter(unaligned)  # what draws a mask, or multiplies factors, needs the whole matrix
        return write_checkpoint(tuned, run.output, pair.edit(rule, blocks), config=pair.config)


def _trained(run: Run, aligned: Path, data: Path, epochs: float, lr: float) -> Path:
    """A LoRA of the aligned model trained on rows of harmful answers, from the cache where the same was trained before.

    Prompts of the evaluation suites are left out. Raises ResafeError where no row is left.
    """
    import tempfile

    from resafe import models
    from resafe.files import digest, file_digest, new_folder
    from resafe.fingerprint import cache_home, model_fingerprint
    from resafe.heldout import drop_overlap
    from resafe.rows import read_jsonl
    from resafe.sft import SFTSettings, sft

    settings = SFTSettings(epochs=epochs, lr=lr)
    name = digest([str(aligned.absolute()), model_fingerprint(aligned), file_digest(data), settings.model_dump(), run.seed])[:16]
    folder = cache_home() / "unaligned" / name
    if folder.is_dir():
        return folder
    rows, dropped = drop_overlap(read_jsonl(data))
    if not rows:
        raise ResafeError(f"{data}: all of its {dropped} prompts are those of evaluation suites: resta needs others to train an unaligned model on.")
    run.log(f"resta: training an unaligned adapter on {len(rows)} rows")
    with new_folder(folder) as new, tempfile.TemporaryDirectory() as work:
        new.chmod(0o700)
        loaded = models.load(aligned)
        trained = sft(loaded.model, loaded.tokenizer, rows, settings, Path(work), run.seed, log=run.log)
        trained.peft_config["default"].base_model_name_or_path = str(aligned.absolute())
        trained.save_pretrained(new)
    return folder


def _vector(folder: Path, aligned: Path) -> Vector:
    """W_aligned - W_unaligned; None where the unaligned model does not differ or has no such tensor."""
    from resafe.weights import Checkpoint, check_tokenizers, counterparts, wide

    if is_adapter(folder):
        return _adapter_vector(folder, aligned)
    model = Checkpoint(folder).plain()
    check_tokenizers(aligned, folder)
    there = counterparts(Checkpoint(aligned).names(), model)

    def full(twin: Twin, theirs: Tensor) -> Tensor | None:
        name = str(twin.aligned)
        if name not in there:
            return None
        if (shape := model.shape(there[name]))[1:] != theirs.shape[1:]:
            raise ResafeError(f"tensor {name} has rows of shape {list(theirs.shape[1:])} in {aligned} and {list(shape[1:])} in {folder}: these are different architectures.")
        first, last = twin.rows or (0, len(theirs) if theirs.ndim else 1)
        common = min(last, model.height(there[name]))  # a vocabulary that one of them has grown
        if common <= first:
            return None
        other = wide(model.finite(there[name], first, common)).to(theirs.dtype)
        if other.shape == theirs.shape:
            return theirs - other
        found = theirs - theirs
        found[: len(other)] = theirs[: len(other)] - other
        return found

    return full


def _adapter_vector(folder: Path, aligned: Path) -> Vector:
    """W_aligned - W_unaligned = -s B A, laid out as the weight is."""
    from resafe.weights import Checkpoint, counterparts
    from resafe.weights._merge import oriented

    adapter, model = adapter_of(folder, aligned), Checkpoint(aligned)
    weights = {f"{name}.weight": module for name, module in adapter.modules.items()}
    modules = {there: weights[name] for name, there in counterparts(weights, model).items()}

    def thin(twin: Twin, theirs: Tensor) -> Tensor | None:
        name = str(twin.aligned)
        return -oriented(model, adapter, modules[name], theirs) if name in modules else None

    return thin


def dare(update: Tensor, p: float, generator: Generator) -> Tensor:
    """Drop entries with probability `p` and divide the rest by 1 - p, which leaves the expectation as it was (DARE)."""
    import torch

    kept = torch.rand(update.shape, generator=generator) >= p
    return update * kept / (1 - p)


def _generator(seed: int, name: str) -> Generator:
    """A generator of the weight's own, so that the mask does not depend on the order of the weights."""
    import hashlib

    import torch

    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1)
