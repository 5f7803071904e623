"""`resafe hook install`: the start-up hook for commands that set PYTHONPATH anew or run `python -E`, `-I`.

A `.pth` file in the site-packages of one environment, written only when asked for. It does nothing in a process that is not below a
`resafe run` (RESAFE_RECEIPTS is not set), and `resafe hook uninstall` takes it away.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from resafe.files import write_text
from resafe.finetune import environment
from resafe.finetune.inject._resafe_start import RECEIPTS

NAME = "resafe_hook.pth"


def place() -> Path:
    """The file in this environment's site-packages."""
    return Path(sysconfig.get_paths()["purelib"]) / NAME


def line() -> str:
    """What Python runs at start-up: one import, and only below a `resafe run`."""
    load = f"sys.path.insert(0, {str(environment.INJECT)!r}); import _resafe_start; sys.path.remove({str(environment.INJECT)!r}); _resafe_start.start()"
    return f"import os, sys; exec({load!r}) if os.environ.get({RECEIPTS!r}) else None\n"


def install() -> Path:
    """Write the file; writing it again is harmless."""
    return write_text(place(), line())


def uninstall() -> Path | None:
    """Remove the file; None if it was not there."""
    if not place().exists():
        return None
    place().unlink()
    return place()
