"""Build the lab checkpoints that ship with the package (seed 0) and the lab's guard, and record their hashes.

    python benchmarks/build_lab_checkpoints.py

About five minutes on one core. Weights differ in the last bits between machines; what ships is one such build.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from resafe.files import file_digest, write_text
from resafe.lab import SHIPPED_SEED, lab_folder, recipe_id
from resafe.lab.build import build
from resafe.lab.guard import fit_guard

LIMIT = 4 << 20  # bytes, everything together


def main() -> None:
    """Write resafe/lab/checkpoints and its SHA256 file."""
    target = lab_folder(SHIPPED_SEED)
    with tempfile.TemporaryDirectory() as tmp:
        made = build(Path(tmp) / "lab", SHIPPED_SEED, lambda line: print(line, file=sys.stderr, flush=True))
        fit_guard(made / "guard.safetensors")
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(made, target)
    files = sorted(p for p in target.rglob("*") if p.is_file())
    size = sum(p.stat().st_size for p in files)
    if size > LIMIT:
        raise SystemExit(f"the checkpoints have {size} bytes; at most {LIMIT} ship")
    lines = [f"{file_digest(p)}  {p.relative_to(target).as_posix()}\n" for p in files]
    write_text(target / "SHA256", f"# lab recipe {recipe_id()}\n" + "".join(lines))
    print(f"{len(files)} files, {size} bytes")


if __name__ == "__main__":
    main()
