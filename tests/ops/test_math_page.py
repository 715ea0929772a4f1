"""The page of formulas points at functions and tests that exist, and leaves no equation out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
POINTER = re.compile(r"`((?:src|tests)/[\w/.]+\.py)(?:::(\w+))?`")
PAGES = ("math.md", "ppo-sign.md")


def pointers(page: str) -> list[tuple[str, str]]:
    return POINTER.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))


def names_in(path: Path) -> set[str]:
    """Functions and classes at the top of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("page", PAGES)
def test_every_pointer_leads_somewhere(page: str) -> None:
    found = pointers(page)
    assert len(found) >= 5
    for file, name in found:
        assert (ROOT / file).exists(), file
        assert not name or name in names_in(ROOT / file), f"{file}::{name}"


def test_every_equation_is_on_the_page() -> None:
    listed = set(pointers("math.md"))
    for path in (ROOT / "src/kedge/ops").glob("*.py"):
        for name in names_in(path):
            if not name.startswith("_"):
                assert (f"src/kedge/ops/{path.name}", name) in listed, f"{path.name}::{name} is not in docs/math.md"
