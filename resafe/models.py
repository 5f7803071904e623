"""Loading models from local folders, vetted first: full checkpoints and LoRA adapters, safetensors only, no remote code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resafe import chat
from resafe.errors import ResafeError, first_line
from resafe.quiet import quieten

# Settings of a LoRA that say where it sits and how large it is; whatever else is set may change the base or the forward pass.
PLAIN = frozenset(
    ["alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_rslora"]
)


INDEX = "model.safetensors.index.json"


@dataclass
class Loaded:
    """A model ready to run (eval mode) with its tokenizer; `folder` is where it came from."""

    model: Any
    tokenizer: Any
    folder: Path


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds a PEFT adapter, not a full checkpoint."""
    return (folder / "adapter_config.json").is_file()


def read_config(file: Path) -> dict[str, Any]:
    """A JSON object from a model folder. Raises ResafeError when it is not one."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ResafeError(f"{file} cannot be read as JSON ({error}).") from None
    if not isinstance(value, dict):
        raise ResafeError(f"{file} does not hold a JSON object.")
    return value


def vet(folder: Path) -> Path:
    """Check, before any loader runs, that `folder` is a model that may be loaded. Returns it; raises ResafeError."""
    if not folder.is_dir():
        raise ResafeError(f"no such model folder: {folder}")
    if is_adapter(folder):
        if read_config(folder / "adapter_config.json").get("alora_invocation_tokens"):
            raise ResafeError(f"{folder} is an activated LoRA, which only acts after its invocation tokens; such adapters are not supported.")
        if not (folder / "adapter_model.safetensors").is_file():
            raise ResafeError(f"{folder} has adapter_config.json but no adapter_model.safetensors.")
        base_of(folder)
        return folder
    if not (folder / "config.json").is_file():
        raise ResafeError(f"{folder} is not a model folder: it has neither config.json nor adapter_config.json.")
    config = read_config(folder / "config.json")
    if "auto_map" in config:
        raise ResafeError(f"{folder}/config.json asks for its own Python code (auto_map); resafe does not run remote code.")
    if (folder / INDEX).is_file() and not (folder / "model.safetensors").is_file():
        weight_map(folder)
    if not list(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin"))
        way_out = "convert its .bin files to safetensors first" if pickled else "save the model there first"
        raise ResafeError(f"{folder} holds no safetensors weights: {way_out}.")
    return folder


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> shard, from the index of a sharded checkpoint. Raises ResafeError where a shard is not a file of that folder."""
    mapping = read_config(folder / INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise ResafeError(f"{folder / INDEX} has no weight_map: copy or download it again.")
    if outside := [s for s in mapping.values() if not isinstance(s, str) or Path(s).name != s]:
        raise ResafeError(f"{folder / INDEX} names {outside[0]!r}, which is not a file of that folder.")
    return mapping


def base_of(adapter: Path) -> Path:
    """The vetted folder of the model that an adapter was trained on."""
    name = read_config(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ResafeError(f"{adapter}/adapter_config.json does not name its base model (base_model_name_or_path).")
    for candidate in (Path(name), adapter / name):
        if candidate.is_dir():
            if is_adapter(candidate):
                raise ResafeError(f"the base model of adapter {adapter} is {name}, an adapter itself: merge that one into its base first.")
            return vet(candidate)
    raise ResafeError(f"the base model of adapter {adapter} is not here: {name}. Put the folder there, or edit adapter_config.json.")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder (an adapter's own, else its base's), with a chat template and a padding token."""
    from transformers import AutoTokenizer

    home = folder
    if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")):
        if not is_adapter(folder):
            raise ResafeError(f"{folder} has no tokenizer files (tokenizer.json): copy the tokenizer into it.")
        home = base_of(folder)
    try:
        return chat.prepare(AutoTokenizer.from_pretrained(home, trust_remote_code=False))
    except (OSError, ValueError, KeyError) as error:
        raise ResafeError(f"the tokenizer in {home} cannot be loaded: {first_line(error)}") from None


def load(folder: str | Path, dtype: str = "auto", quantise: bool = False, merge: bool = True) -> Loaded:
    """Load a checkpoint or a merged adapter for inference or further training.

    `dtype` is a torch dtype name; "auto" keeps the stored one on an accelerator and takes float32 on a CPU. An adapter is
    merged into its base in the loading dtype, or without `merge` left in its layers. `quantise` loads the weights in 4 bits
    (bitsandbytes, NF4). Raises ResafeError for whatever is wrong with the folder.
    """
    path = vet(Path(folder))
    quieten()
    tokenizer = load_tokenizer(path)
    model = load_weights(base_of(path) if is_adapter(path) else path, dtype, quantise)
    if is_adapter(path):
        model = _put_on(model, path, merge)
        model = model if merge else model.get_base_model()
    check_vocabulary(tokenizer, model, path)
    return Loaded(model.eval(), tokenizer, path)


def check_vocabulary(tokenizer: Any, model: Any, folder: Path) -> None:
    """Raise ResafeError if `tokenizer` knows tokens that `model` has no embeddings for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ResafeError(f"the tokenizer of {folder} has {len(tokenizer)} entries but the model only {rows} embedding rows.")


def attachable(adapter: Path) -> bool:
    """Whether an adapter is a plain LoRA, which can be put on a base and taken off again without touching its weights.

    Not so: anything else than low-rank factors in its file (whole modules, token rows, biases), any setting beyond `PLAIN` (DoRA,
    KaSA, ...), initialisations that change the base (PiSSA, OLoRA, ...), other methods than LoRA. Such an adapter is merged into a
    base of its own. Raises ResafeError for a file that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    config, weights = read_config(adapter / "adapter_config.json"), adapter / "adapter_model.safetensors"
    try:
        with safe_open(weights, framework="numpy") as f:
            factors = all(".lora_A." in k or ".lora_B." in k or ".lora_embedding_" in k for k in f.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ResafeError(f"{weights} cannot be read ({first_line(error)}): copy it again, or save the adapter again.") from None
    return (
        factors
        and config.get("peft_type") == "LORA"
        and not any(value for key, value in config.items() if key not in PLAIN)
        and config.get("bias", "none") == "none"
        and config.get("init_lora_weights", True) in (True, False, "gaussian", "orthogonal")
    )


@contextmanager
def attached(model: Any, adapter: Path) -> Iterator[Any]:
    """`model` with a LoRA adapter in its layers; changes it in place and takes the adapter off at the end. See `attachable`."""
    peft = _put_on(model, adapter, merge=False)
    try:
        yield peft.get_base_model().eval()
    finally:
        peft.unload()


def load_weights(home: Path, dtype: str = "auto", quantise: bool = False) -> Any:
    """The model of a vetted full checkpoint, in eval mode; `load` says what `dtype` and `quantise` are."""
    import torch
    from transformers import AutoModelForCausalLM

    kind: Any = dtype if dtype != "auto" or torch.cuda.is_available() else torch.float32
    options: dict[str, Any] = {"dtype": kind, "trust_remote_code": False, "use_safetensors": True}
    if torch.cuda.is_available():
        options["device_map"] = {"": 0}
    if quantise:
        options["quantization_config"] = _nf4()
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(home, output_loading_info=True, ignore_mismatched_sizes=True, **options)
        model, info = found
    except Exception as error:  # loaders raise a dozen types; all mean that this folder cannot be used
        raise ResafeError(f"the model in {home} cannot be loaded: {first_line(error)}") from None
    if other := sorted(info["mismatched_keys"], key=str):
        name, stored, expected = other[0]
        raise ResafeError(f"tensor {name} has shape {list(stored)} in {home}, and its config.json asks for {list(expected)}: these are not of one model; copy both again.")
    if missing := sorted(info["missing_keys"]):
        raise ResafeError(f"{home} lacks {len(missing)} weights of its architecture, such as {missing[0]}.")
    return model.eval()


def _nf4() -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ResafeError("4-bit loading needs bitsandbytes: pip install 'resafe[gpu]'.") from None
    import torch
    from transformers import BitsAndBytesConfig

    kind = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    config: Any = BitsAndBytesConfig
    return config(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=kind)


def _put_on(model: Any, adapter: Path, merge: bool) -> Any:
    """A PeftModel around `model`, or `model` with the adapter merged in."""
    from peft import PeftModel

    kind = read_config(adapter / "adapter_config.json").get("peft_type")
    if not merge and kind != "LORA":
        raise ResafeError(f"the adapter in {adapter} is of kind {kind}: only LoRA can be used without merging it.")
    try:
        found: Any = PeftModel.from_pretrained(model, adapter, use_safetensors=True)
        return found.merge_and_unload() if merge else found
    except Exception as error:
        raise ResafeError(f"the adapter in {adapter} does not fit its base: {first_line(error)}") from None
