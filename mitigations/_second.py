"""A second update of the aligned model, beside the fine-tune's: named by the user, or trained here and kept in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.mitigation import Run
from resafe.models import is_adapter
from resafe.rows import Row
from resafe.weights import adapter_of

if TYPE_CHECKING:
    from torch import Tensor

    from resafe.sft import SFTSettings
    from resafe.weights import Pair, Twin

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


def update_of(folder: Path, pair: Pair) -> Update:
    """W_second - W_aligned for the weights of `pair`; None where the second model, an adapter, does not touch one.

    Raises ResafeError, before any arithmetic, for a second model that does not fit the aligned one, or does not differ from it.
    """
    return _adapter_update(folder, pair) if is_adapter(folder) else _full_update(folder, pair)


def _full_update(folder: Path, pair: Pair) -> Update:
    from resafe.weights import Checkpoint, check_tokenizers, counterparts, wide
    from resafe.weights.checkpoint import is_vocabulary, same_tensor
    from resafe.weights.pair import COMPUTED, some

    model = Checkpoint(folder).plain()
    check_tokenizers(pair.aligned.folder, folder)
    known = [t for t in pair.twins if t.aligned is not None and pair.aligned.floating(t.aligned) and not COMPUTED.search(t.name)]
    there = counterparts([t.name for t in known], model)
    if lost := [t.name for t in known if t.name not in there]:
        raise ResafeError(f"{folder} lacks {len(lost)} tensors of {pair.aligned.folder}: {some(lost)}. Is it the same architecture?")
    if extra := [n for n in model.names() if n not in there.values() and model.floating(n) and not COMPUTED.search(n) and not is_vocabulary(n)]:
        raise ResafeError(f"{folder} has {len(extra)} tensors that {pair.aligned.folder} lacks: {some(extra)}. Is it the same architecture?")
    for twin in known:
        ours, theirs = pair.aligned.shape(str(twin.aligned)), model.shape(there[twin.name])
        if ours[1:] != theirs[1:] or (ours != theirs and not twin.vocabulary):
            raise ResafeError(f"tensor {twin.name} has shape {list(ours)} in {pair.aligned.folder} and {list(theirs)} in {folder}: these are different architectures.")
    if all(same_tensor(model, there[t.name], pair.aligned, str(t.aligned)) for t in known):  # as a rule the first differs
        raise ResafeError(f"{folder} has the weights of {pair.aligned.folder}: name a model that was fine-tuned from it.")

    def update(twin: Twin, theirs: Tensor) -> Tensor | None:
        if twin.name not in there:
            return None
        name = there[twin.name]
        first, last = twin.rows or (0, len(theirs) if theirs.ndim else 1)
        common = min(last, model.height(name))  # a vocabulary that one of them has grown
        if common <= first:
            return None
        other = wide(model.finite(name, first, common)).to(theirs.dtype)
        if other.shape == theirs.shape:
            return other - theirs
        found = theirs - theirs
        found[: len(other)] = other - theirs[: len(other)]
        return found

    return update


def _adapter_update(folder: Path, pair: Pair) -> Update:
    """s B A, laid out as the weight is."""
    from resafe.weights._pieces import adapted, changed, pieces

    adapter = adapter_of(folder, pair.aligned.folder)
    found = pieces(adapter.modules, [t.name for t in pair.twins])
    if lost := sorted(adapter.modules.keys() - adapted(found)):
        raise ResafeError(f"{folder} adapts {lost[0]}, of which {pair.tuned.folder} has no tensor of its own: merge that adapter into {pair.aligned.folder} and name the full checkpoint.")
    if not any(bool(adapter.tensor(m.b).any()) and bool(adapter.tensor(m.a).any()) for m in adapter.modules.values()):
        raise ResafeError(f"the adapter {folder} changes nothing: its B (or A) is zero throughout.")

    def update(twin: Twin, theirs: Tensor) -> Tensor | None:
        return changed(pair.aligned, adapter, found[twin.name], theirs) if twin.name in found else None

    return update
