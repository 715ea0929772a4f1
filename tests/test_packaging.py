"""The package as a stranger meets it: imports, layout, setup, and what the documents promise."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import kedge

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "kedge"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def import_every(package: str, *, without: tuple[str, ...]) -> None:
    """Import every module of a package in a fresh process in which `without` are not installed."""
    program = f"""
import importlib, pkgutil, sys
for absent in {without!r}:
    sys.modules[absent] = None
module = importlib.import_module({package!r})
for found in pkgutil.walk_packages(getattr(module, "__path__", []), {package!r} + "."):
    importlib.import_module(found.name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["trace", "diagnose", "report", "recipe", "errors", "progress", "cli"])
def test_looking_needs_no_training_stack(name: str) -> None:
    import_every(f"kedge.{name}", without=("torch", "transformers", "safetensors", "tokenizers", "datasets", "peft"))


def test_training_needs_no_optional_package() -> None:
    import_every("kedge", without=("datasets", "peft", "pytest", "hypothesis"))


def test_the_core_has_no_torch_and_nobody_is_capped() -> None:
    core = PROJECT["project"]["dependencies"]
    extras = PROJECT["project"]["optional-dependencies"]
    assert not any(re.match("torch|transformers|datasets", dependency) for dependency in core)
    assert "torch>=2.9" in extras["train"], "a cap on torch belongs into constraints.txt, not into what users install"
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in constraints if not line.startswith("#")] == ["torch<2.14"]


def test_every_import_is_declared() -> None:
    """A module of a third party that the package imports is a dependency of the core or of an extra."""
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    declared = {re.split(r"[><=\[ ]", dependency)[0].replace("-", "_") for group in groups for dependency in group}
    imported = {
        name.split(".")[0]
        for path in SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in _imported(node)
    }
    assert imported - declared - set(sys.stdlib_module_names) - {"kedge"} == set()


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []


def test_the_package_is_typed_and_has_its_version() -> None:
    assert (SOURCES / "py.typed").exists()
    assert re.fullmatch(r"\d+\.\d+\.\d+", kedge.__version__)
    module, _, function = PROJECT["project"]["scripts"]["kedge"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


# Documents


def test_the_readme_shows_the_whole_layout() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("src/kedge/\n")[1].split("```")[0]
    shown = {match[1] for match in re.finditer(r"^  ([\w./]+)  +\S", tree, flags=re.MULTILINE)}
    there = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in SOURCES.iterdir()
        if not path.name.startswith("_") and path.suffix in (".py", "")
    }
    assert shown == there


def test_the_loop_in_the_readme_calls_what_exists() -> None:
    """Each call of the README's loop fits the signature of the function it names."""
    from kedge.ops.control import adapted_coefficient
    from kedge.rollout.engine import TorchEngine
    from kedge.rollout.score import score_rollouts
    from kedge.train.experience import make_experience
    from kedge.train.update import update

    functions = {
        function.__name__: function for function in (adapted_coefficient, score_rollouts, make_experience, update)
    }
    functions["generate"] = TorchEngine(0, 0).generate
    (loop,) = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(loop.splitlines()) == 5
    for statement in ast.parse(loop).body:
        assert isinstance(statement, ast.Assign)
        call = statement.value
        assert isinstance(call, ast.Call)
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        inspect.signature(functions[name]).bind(*call.args, **{str(word.arg): word.value for word in call.keywords})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if not (document.parent / link).exists()] == []


def test_every_page_can_be_reached_from_the_index() -> None:
    reached: set[Path] = set()
    waiting = [(ROOT / "docs" / "index.md").resolve()]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        waiting += [(page.parent / link).resolve() for link in links if (page.parent / link).exists()]
    assert [str(page) for page in DOCUMENTS if page.resolve() not in reached] == []


# Make


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with the Makefile and an installation that only says how it was called."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("kedge", "python", "ruff", "mypy", "lint-imports"):
        (binaries / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (binaries / name).chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    return tmp_path


def make(folder: Path, *arguments: str) -> list[str]:
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=folder, capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin:/usr/local/bin"},
    )  # fmt: skip
    return done.stdout.splitlines()


def test_every_demo_gets_a_folder_of_its_own(elsewhere: Path) -> None:
    assert make(elsewhere, "demo") == ["kedge demo --out runs/demo"]
    (elsewhere / "runs" / "demo").mkdir(parents=True)
    assert make(elsewhere, "demo") == ["kedge demo --out runs/demo-2"]
    (elsewhere / "runs" / "demo-2").mkdir()
    assert make(elsewhere, "demo", "ARGS=--seed 3") == ["kedge demo --out runs/demo-3 --seed 3"]


def test_check_runs_all_tests_then_the_tools(elsewhere: Path) -> None:
    lines = make(elsewhere, "check")
    assert [line.split()[0] for line in lines] == ["python", "python", "ruff", "ruff", "mypy", "lint-imports"]
    assert "-m not slow" in lines[0]
    assert "-m slow" in lines[1]


def test_continuous_integration_calls_make_check() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith("make check")
