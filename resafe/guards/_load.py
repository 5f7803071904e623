"""From a spec to a guard."""
from __future__ import annotations
from resafe.guards._base import Guard
def load_guard(spec: str) -> Guard:
    raise NotImplementedError
