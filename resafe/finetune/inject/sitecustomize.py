"""Found by Python at start-up because `resafe run` put this folder first on PYTHONPATH. Starts the hook, then the user's own."""

import os as _os
import sys as _sys
from importlib.machinery import PathFinder as _PathFinder
from importlib.util import module_from_spec as _module_from_spec

_here = _os.path.dirname(_os.path.abspath(__file__))

import _resafe_start  # noqa: E402  (beside this file, which is on the path)


def _chain() -> None:
    """Run the sitecustomize that this one hides, as if it had been found."""
    others = [p for p in _sys.path if _os.path.abspath(p or ".") != _here]
    spec = _PathFinder.find_spec("sitecustomize", others)
    if spec is None or spec.loader is None:
        return
    module = _module_from_spec(spec)
    _sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


try:
    _resafe_start.start()
finally:
    _chain()
