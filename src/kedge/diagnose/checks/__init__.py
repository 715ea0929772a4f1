"""The checks, and what they have in common: a function of a view, a page, and what it wants to know of every step.

Each module holds one check, `CHECK`; the module's docstring is the check's page in docs/checks.md.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cache

from kedge.diagnose.checks.check import Check
from kedge.diagnose.finding import Finding
from kedge.diagnose.needs import missing
from kedge.diagnose.view import Reducer, View

__all__ = ["Check", "all_checks", "check_named", "page", "possible", "reducers", "run_checks"]


@cache
def all_checks() -> tuple[Check, ...]:
    """Every check, in the order in which causes are ruled out: cheap identities first, symptoms last."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "check")
    found = [importlib.import_module(f"{__name__}.{name}").CHECK for name in names]
    return tuple(sorted(found, key=lambda check: (check.kind.value, check.name)))


def check_named(name: str) -> Check:
    """The check called `name`; raises `KeyError`."""
    return {check.name: check for check in all_checks()}[name]


def reducers() -> Iterator[Reducer]:
    """What all checks want to know of every step."""
    return (check.facts for check in all_checks() if check.reduce is not None)


def run_checks(view: View, names: frozenset[str] | None = None) -> tuple[Finding, ...]:
    """What every check, or those named, finds in a view, in the order of `all_checks`."""
    return tuple(check(view) for check in all_checks() if names is None or check.name in names)


def possible(view: View) -> tuple[tuple[Check, tuple[str, ...]], ...]:
    """Every check with what the run lacks for it; nothing lacks where it can be made."""
    return tuple((check, missing(check.needs, view.absent | view.lacks)) for check in all_checks())


def page(check: Check) -> str:
    """The check's page: what, why, how computed, false alarms, remedy, references."""
    return inspect.cleandoc(importlib.import_module(f"{__name__}.{check.name}").__doc__ or "")
