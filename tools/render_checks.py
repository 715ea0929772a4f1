"""Write docs/checks.md from the checks' docstrings. `tests/diagnose/test_diagnosis.py` holds it current.

Usage: python tools/render_checks.py
"""

from __future__ import annotations

from pathlib import Path

from kedge.diagnose.checks import Check, all_checks, page
from kedge.diagnose.checks.check import Kind
from kedge.diagnose.mechanisms import MECHANISMS

PAGE = Path(__file__).parents[1] / "docs" / "checks.md"
HEAD = """# Checks

Everything that `kedge diagnose RUN` looks for, in the order in which causes are ruled out. `tools/render_checks.py`
writes this page from the docstrings in `src/kedge/diagnose/checks/`; change them there. `kedge checks NAME` prints one.

A check that is *not validated* has not been tried on faults and healthy runs other than those it was made with. It
never ranks before one that has. [Diagnosis](diagnosis.md) says how to read what the checks find.

"""
KINDS = {
    Kind.INTEGRITY: ("Integrity", "A number is not what it is taken for."),
    Kind.CAUSE: ("Causes", "Something pushes the policy."),
    Kind.SYMPTOM: ("Symptoms", "What has become of the policy, whatever pushed it."),
    Kind.BENIGN: ("No fault", "A change that looks like one."),
}


def render() -> str:
    """The page."""
    rows = "".join(
        f"| [`{check.name}`](#{check.name}) | {check.title} | {check.kind.name.lower()} | "
        f"{', '.join(check.mechanisms) or '–'} | {'yes' if check.validated else 'no'} |\n"
        for check in all_checks()
    )
    table = "| check | finds | kind | mechanisms | validated |\n| --- | --- | --- | --- | --- |\n" + rows
    return HEAD + table + _mechanisms() + "".join(map(_kind, KINDS))


def _mechanisms() -> str:
    """The ways in which a policy comes to drift, each with the checks that look for it."""
    rows = "".join(
        f"| {number} | {what} | "
        f"{', '.join(f'[`{check.name}`](#{check.name})' for check in all_checks() if number in check.mechanisms)} |\n"
        for number, what in MECHANISMS.items()
    )
    return "\n## Mechanisms\n\n| number | what happens | checks |\n| --- | --- | --- |\n" + rows


def _kind(kind: Kind) -> str:
    title, what = KINDS[kind]
    found = [check for check in all_checks() if check.kind is kind]
    return f"\n## {title}\n\n{what}\n" + "".join(map(_check, found)) if found else ""


def _check(check: Check) -> str:
    return f"\n### {check.name}\n\n{page(check).strip()}\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
