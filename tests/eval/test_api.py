"""`resafe.eval` is quick to import, and its names are what they say whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

import pytest

import resafe.eval


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "('torch', 'scipy', 'jinja2', 'transformers', 'numpy')"
    code = f"import sys, resafe.eval; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", resafe.eval.__all__)
def test_every_public_name_is_callable(name: str) -> None:
    __import__("resafe.eval.evaluation")
    __import__("resafe.eval.comparison")
    assert callable(getattr(resafe.eval, name))


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = resafe.eval.nothing
