"""The embedded lab model: fine-tuning breaks its safety and mitigations restore it, in minutes, with nothing harmful in it.

Seed 0 ships with the package; other seeds are built from scratch once (about five minutes) and cached.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from resafe.errors import ResafeError
from resafe.fingerprint import cache_home
from resafe.remote import fetch, is_url

SHIPPED_SEED = 0


def lab_folder(seed: int = SHIPPED_SEED, log: Callable[[str], None] = lambda _: None) -> Path:
    """The folder with `base/`, `aligned/` and `guard.safetensors` of a seed; built and cached if it does not ship."""
    if seed == SHIPPED_SEED:
        return Path(str(files("resafe.lab") / "checkpoints"))
    folder = cache_home() / f"lab-{recipe_id()}-seed{seed}"
    if not folder.is_dir():
        from resafe.files import new_folder
        from resafe.lab.build import build

        log(f"building the lab model of seed {seed} (once; a few minutes)")
        with new_folder(folder) as new:
            build(new, seed, log)
    return folder


def recipe_id() -> str:
    """Hash of everything that decides what is built; another one means another cache entry."""
    from resafe.files import digest, file_digest

    here = Path(str(files("resafe.lab")))
    return digest([file_digest(here / f) for f in ("words.yaml", "grammar.py", "build.py", "_train.py")])[:10]


def guard_path() -> Path:
    """The guard fitted on training-split exchanges of the lab; the same one for every seed."""
    return lab_folder(SHIPPED_SEED) / "guard.safetensors"


def resolve(model: str, seed: int = SHIPPED_SEED, log: Callable[[str], None] = lambda _: None) -> Path:
    """A model argument -> folder: `lab`, `lab:base`, `lab:aligned` (of `seed`), a URL (`remote.fetch`), or a path that stands for itself."""
    if is_url(model):
        return fetch(model, log)
    if model != "lab" and not model.startswith("lab:"):
        return Path(model)
    part = model.partition(":")[2] or "aligned"
    if part not in ("base", "aligned"):
        raise ResafeError(f"unknown lab checkpoint '{model}'; known: lab:base, lab:aligned.")
    return lab_folder(seed, log) / part


def export(output: Path, seed: int = SHIPPED_SEED, log: Callable[[str], None] = lambda _: None) -> Path:
    """Copy the checkpoints of a seed to `output` (what `resafe lab build` does)."""
    from resafe.files import new_folder

    source = lab_folder(seed, log)
    with new_folder(output) as new:
        shutil.copytree(source, new, dirs_exist_ok=True)
    return output
