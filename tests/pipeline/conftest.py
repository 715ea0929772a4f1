"""Tiny runs on the built-in desk, each made once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from processes import RECIPE, ran

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    ran(folder, "run", recipe, "--out", folder / "run")
    return folder / "run"


@pytest.fixture(scope="session")
def apart(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The same run in a process started from nothing, with what it wrote to its streams."""
    run = tmp_path_factory.mktemp("apart") / "run"
    arguments = ["run", str(recipe), "--out", str(run), "--json"]
    program = f"import sys, processes; processes.shrink(); from kedge.cli import main; sys.exit(main({arguments}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True, check=True, timeout=120
    )
    return run, done.stdout, done.stderr


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe without what only some methods read."""
    path = tmp_path_factory.mktemp("plain") / "tiny.toml"
    text = RECIPE.replace('mode = "adaptive"\ntarget = 0.1\nhorizon = 40\n', "")
    path.write_text(text.replace("missing_eos_penalty = 0.5\n", ""))
    return path


@pytest.fixture(scope="session")
def start(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has a reward model and no more."""
    folder = tmp_path_factory.mktemp("start")
    for stage in ("sft", "reward"):
        ran(folder, stage, plain, "--out", folder / "run", *(["--resume"] if stage == "reward" else []))
    return folder / "run"
