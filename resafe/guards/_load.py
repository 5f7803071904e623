"""From a spec, as users write it in commands, parameters and manifests, to a guard."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from resafe.errors import ResafeError, suggest
from resafe.guards._base import Guard
from resafe.guards.families import FAMILIES

if TYPE_CHECKING:
    from resafe.guards.linear import LinearGuard

OFFLINE = Path(__file__).parent.parent / "data" / "guard" / "offline.safetensors"
BUILTIN = ("offline", "refusal", "harm", "rules", "lab")
NAMES = (*BUILTIN, "encoder", "moderation", "chat:MODEL@URL")
_CHAT = re.compile(r"chat:(?P<model>.+?)@(?P<url>https?://[^#\s]+)(?:#(?P<family>\w+))?")


def load_guard(spec: str) -> Guard:
    """A guard by its spec.

    offline | refusal | harm | rules | lab | encoder[:FOLDER] | FILE.safetensors | FOLDER[?family=NAME] | FAMILY:FOLDER | moderation[:MODEL] |
    chat:MODEL@URL[#FAMILY]. `refusal` and `harm` are `offline` with one head. Raises ResafeError for anything else, and for guards that cannot be loaded.
    """
    if spec in BUILTIN:
        return _builtin(spec)
    if spec == "encoder" or spec.startswith("encoder:"):
        from resafe.guards.encoder import find_encoder

        return _encoder(spec.partition(":")[2] or str(find_encoder()))
    if spec == "moderation" or spec.startswith("moderation:"):
        from resafe.guards.endpoint import ModerationGuard

        return ModerationGuard(*filter(None, [spec.partition(":")[2]]))
    if spec.startswith("chat:"):
        return _chat(spec)
    return _local(spec)


@lru_cache(maxsize=1)
def offline() -> LinearGuard:
    """The guard that ships, both heads."""
    from resafe.guards.linear import LinearGuard

    return LinearGuard.load(OFFLINE, "offline")


@lru_cache(maxsize=1)
def _encoder(folder: str) -> Guard:
    from resafe.guards.encoder import EncoderGuard

    return EncoderGuard.load(folder, offline())


@lru_cache(maxsize=len(BUILTIN))
def _builtin(name: str) -> Guard:
    if name == "rules":
        from resafe.guards.rules import RuleGuard

        return RuleGuard()
    if name == "offline":
        return offline()
    if name in ("refusal", "harm"):
        return offline().only(name)
    from resafe.guards.linear import LinearGuard
    from resafe.lab import guard_path

    return LinearGuard.load(guard_path(), "lab")


def _chat(spec: str) -> Guard:
    from resafe.guards.endpoint import ChatGuard

    if not (found := _CHAT.fullmatch(spec)):
        raise ResafeError(f"'{spec}' is not of the form chat:MODEL@URL or chat:MODEL@URL#FAMILY.")
    return ChatGuard(found["url"], found["model"], found["family"])


def _local(spec: str) -> Guard:
    path, family_name = _split(spec)
    if Path(path).is_file() and path.endswith(".safetensors") and family_name is None:
        from resafe.guards.linear import LinearGuard

        return LinearGuard.load(path)
    if path and Path(path).is_dir():
        from resafe.guards.hf import TransformersGuard

        return TransformersGuard(path, family_name)
    if path.endswith(".safetensors") or "/" in path:
        raise ResafeError(f"no such guard file or folder: {path}")
    raise ResafeError(f"unknown guard '{spec}'. {suggest(spec, NAMES)}")


def _split(spec: str) -> tuple[str, str | None]:
    """(path, family): `FOLDER?family=NAME` and `FAMILY:FOLDER`; a path that exists is taken as it is."""
    if Path(spec).exists():
        return spec, None
    path, mark, name = spec.partition("?family=")
    if mark:
        return path, name
    name, mark, path = spec.partition(":")
    return (path, name) if mark and name in FAMILIES else (spec, None)
