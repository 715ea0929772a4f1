"""Files of made-up judgments, and what the tests ask of them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from kedge.data.audit.findings import Finding
from kedge.data.audit.gather import gather
from kedge.data.audit.tables import Tables
from kedge.data.audit.whole import Audit

ROOT = Path(__file__).resolve().parents[3]


def script(name: str) -> ModuleType:
    """A script of the folder benchmarks, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tables(folder: Path, rows: Iterable[Mapping[str, Any]]) -> Tables:
    return gather(write(folder / "rows.jsonl", rows))


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def finding(found: Audit, name: str) -> Finding:
    return next(one for one in found.findings if one.name == name)
