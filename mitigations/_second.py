"""A second update of the aligned model, beside the fine-tune's: named by the user, or trained here and kept in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.mitigation import Run
from resafe.mitigations._updates import adapter_of
from resafe.models import is_adapter
from resafe.rows import Row

if TYPE_CHECKING:
    from torch import Tensor

    from resafe.sft import SFTSettings
    from resafe.weights import Twin

Update = Callable[["Twin", Any], Any]  # a weight (which rows of it), W_aligned -> W_second - W_aligned, or None


def trained(run: Run, kind: str, aligned: Path, rows: Sequence[Row], settings: SFTSettings) -> Path:
    """A LoRA of `aligned` trained on `rows`, from the cache's folder `kind` where the same was trained before.

    Readable by the user only.
    """
    import tempfile

    from resafe import models
    from resafe.files import digest, new_folder
    from resafe.fingerprint import cache_home, model_fingerprint
    from resafe.sft import sft

    name = digest([str(aligned.absolute()), model_fingerprint(aligned), rows, settings.model_dump(), run.seed])[:16]
    folder = cache_home() / kind / name
    if folder.is_dir():
        return folder
    run.log(f"training a LoRA of {aligned} on {len(rows)} rows, as the {kind} model")
    with new_folder(folder) as new, tempfile.TemporaryDirectory() as work:
        new.chmod(0o700)
        loaded = models.load(aligned)
        made = sft(loaded.model, loaded.tokenizer, list(rows), settings, Path(work), run.seed, log=run.log)
        made.peft_config["default"].base_model_name_or_path = str(aligned.absolute())
        made.save_pretrained(new)
    return folder


def update_of(folder: Path, aligned: Path) -> Update:
    """W_second - W_aligned, weight by weight; None where the second model does not differ or has no such tensor."""
    from resafe.weights import Checkpoint, check_tokenizers, counterparts, wide

    if is_adapter(folder):
        return _adapter_update(folder, aligned)
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
            return other - theirs
        found = theirs - theirs
        found[: len(other)] = other - theirs[: len(other)]
        return found

    return full


def _adapter_update(folder: Path, aligned: Path) -> Update:
    """s B A, laid out as the weight is."""
    from resafe.weights import Checkpoint, counterparts
    from resafe.weights._merge import oriented

    adapter, model = adapter_of(folder, aligned), Checkpoint(aligned)
    weights = {f"{name}.weight": module for name, module in adapter.modules.items()}
    modules = {there: weights[name] for name, there in counterparts(weights, model).items()}

    def thin(twin: Twin, theirs: Tensor) -> Tensor | None:
        name = str(twin.aligned)
        return oriented(model, adapter, modules[name], theirs) if name in modules else None

    return thin
