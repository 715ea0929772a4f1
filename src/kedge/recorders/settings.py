"""Reading a trainer's settings, however it keeps them: mappings, namespaces, OmegaConf."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def setting(config: Any, *paths: str, default: Any = None) -> Any:
    """What the first of the dotted `paths` that is there holds, `default` where none is or it holds None.

    Several paths are names of the same setting in different versions of a trainer.
    """
    for path in paths:
        found = config
        for name in path.split("."):
            found = _member(found, name)
        if found is not None:
            return found
    return default


def _member(holder: Any, name: str) -> Any:
    if holder is None:
        return None
    if isinstance(holder, Mapping) or hasattr(holder, "keys"):  # OmegaConf's mappings are no Mapping
        return holder.get(name)
    return getattr(holder, name, None)


def known(**settings: Any) -> dict[str, Any]:
    """`settings` without those that are not known, and without sections that hold nothing then."""
    kept: dict[str, Any] = {}
    for name, value in settings.items():
        value = known(**value) if isinstance(value, Mapping) else value
        if value is not None and value != {}:
            kept[name] = value
    return kept


def versioned(name: str, package: str) -> str:
    """A trainer's name and, where its package is installed, its version."""
    try:
        return f"{name} {version(package)}"
    except PackageNotFoundError:
        return name
