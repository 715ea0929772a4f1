"""The documentation does what it says: code runs, commands parse, what it names exists, and what exists is named.

In a page, Python blocks run in order in one namespace, in a folder that holds the run `runs/demo/drift`. Two comments
may stand before a block: `<!-- no-run: why -->`, and `<!-- output -->` before a text block that shows what the Python
block before it prints.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from kedge import cli, recipe
from kedge.desk import gold
from kedge.trace.schema import METRICS, probe_schema, sample_schema, step_schema

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "kedge"
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("trace", "oracles")]

PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
WITHOUT_TORCH = [DOCS / "trace.md", DOCS / "explaining-a-run.md"]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the comment before it, and the line on which its code begins."""

    language: str
    comment: str
    line: int
    code: str

    @property
    def runs(self) -> bool:
        return self.language == "python" and not re.fullmatch(r"<!-- no-run: \S.+ -->", self.comment)


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    fence = re.compile(r"(?:^(<!--.*-->)\n+)?^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
    return [Block(m[2], m[1] or "", text.count("\n", 0, m.start(3)), m[3]) for m in fence.finditer(text)]


def having(language: str) -> list[Path]:
    return [page for page in PAGES if any(block.language == language for block in blocks(page))]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


# Code


def loop_names() -> dict[str, Any]:
    """What the README's loop takes for given, on a task small enough to list every response."""
    import torch
    from lab import prompts_of, score_of

    from kedge.experiment.verify.enumerable import EOS, PAD, Space, TableModel, random_task
    from kedge.ops.control import adapted_coefficient
    from kedge.rollout.engine import TorchEngine
    from kedge.rollout.score import score_rollouts
    from kedge.structs import Sampling
    from kedge.train.experience import make_experience
    from kedge.train.update import Learner, UpdateSettings, update

    task = random_task(Space(2, 2))
    policy = TableModel(task.space, task.reference)
    functions = (adapted_coefficient, score_rollouts, make_experience, update)
    return {function.__name__: function for function in functions} | {
        "engine": TorchEngine(eos_id=EOS, pad_id=PAD),
        "policy": policy,
        "prompts": prompts_of(task.space, 8),
        "sampling": Sampling(task.space.budget),
        "rng": torch.Generator().manual_seed(0),
        "reference": TableModel(task.space, task.reference),
        "critic": None,
        "rewarders": {"score": score_of(task)},
        "eos": EOS,
        "beta": 0.1,
        "weights": {"score": 1.0, "kl": -0.1, "length": 0.0, "missing_eos": -1.0},
        "learner": Learner(policy, torch.optim.Adam(policy.parameters())),
        "settings": UpdateSettings(epochs=1, minibatches=1, clip=0.2),
        "variance": torch.ones(4),
        "kl_per_sequence": 3.0,
        "target": 6.0,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a run in it."""
    from synthetic_run import make_run

    path = tmp_path_factory.mktemp("docs")
    make_run(path / "runs" / "demo" / "drift")
    return path


@pytest.mark.parametrize("page", [page for page in having("python") if page not in WITHOUT_TORCH], ids=named)
def test_code_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names = loop_names() if page.name == "README.md" else {}
    printed = io.StringIO()
    for block in blocks(page):
        if block.runs:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * block.line + block.code, named(page), "exec"), names)
        elif block.comment == "<!-- output -->":
            assert block.code == printed.getvalue(), f"{named(page)}:{block.line}"


def test_looking_at_a_run_needs_no_torch(folder: Path) -> None:
    """The pages that read a run, in a process in which PyTorch is not installed."""
    program = """
import json, sys
sys.modules["torch"] = sys.modules["transformers"] = None
for page, blocks in json.load(sys.stdin):
    names = {}
    for line, code in blocks:
        exec(compile("\\n" * line + code, page, "exec"), names)
"""
    given = [(named(page), [(b.line, b.code) for b in blocks(page) if b.runs]) for page in WITHOUT_TORCH]
    assert all(len(code) > 2 for _, code in given)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, input=json.dumps(given), cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [*having("toml"), *having("json")], ids=named)
def test_data_blocks_can_be_read(page: Path) -> None:
    """TOML in the documentation is a recipe."""
    for block in blocks(page):
        if block.language == "toml":
            recipe.parse(block.code, source=named(page))
        elif block.language == "json":
            json.loads(block.code)


def commands() -> Iterator[tuple[str, str]]:
    """Every command line of kedge or make, in shell blocks and in running text, with its page."""
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        lines = [line for block in blocks(page) if block.language == "sh" for line in block.code.splitlines()]
        lines += re.findall(r"`((?:kedge|make) [^`]+)`", page.read_text(encoding="utf-8"))
        yield from ((named(page), line) for line in lines if line.startswith(("kedge ", "make ")))


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_commands_parse(page: str, line: str) -> None:
    program, name, *rest = shlex.split(line, comments=True)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert name in targets
        return
    group: Any = typer.main.get_command(cli.app)
    if name.startswith("-"):
        group.make_context("kedge", [name, *rest])
        return
    settings = group.commands[name].make_context(name, rest).params.get("settings") or ()
    files = any(setting.startswith("data.") for setting in settings)
    recipe.build({"world": "files", "data": {"demonstrations": "d", "preferences": "p"}} if files else {}, settings)


# Names


@cache
def names_in(path: Path) -> set[str]:
    """Functions, classes, methods and constants that a module defines."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def references(text: str) -> list[tuple[str, str]]:
    """`path.py` and `path.py::name` in code spans; the name is empty where only a file is named."""
    return re.findall(r"`([\w/.-]+\.py)(?:::([\w.]+))?`", text)


def located(path: str) -> Path:
    """Paths are relative to the repository, or to the package."""
    return ROOT / path if path.startswith(("src/", "tests/", "tools/", "benchmarks/")) else SOURCES / path


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=named)
def test_named_functions_and_tests_exist(page: Path) -> None:
    missing = [
        f"{path}::{name}"
        for path, name in references(page.read_text(encoding="utf-8"))
        if not located(path).exists() or (name and name not in names_in(located(path)))
    ]
    assert missing == []


def rows(page: Path, heads: tuple[str, ...]) -> list[list[str]]:
    """Cells of every table with these heads; a backslash keeps a pipe inside its cell."""
    tables = re.findall(r"(?:^\|.*\|\n)+", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    split = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()] for table in tables]
    cells = [[[cell.strip() for cell in line] for line in table] for table in split]
    return [line for table in cells if table[0] == list(heads) for line in table[2:]]


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


MAP = rows(DOCS / "map.md", ("concept", "equation", "function", "test", "metric", "check"))
DETAILS = rows(DOCS / "ppo-details.md", ("#", "detail", "what Kedge does, and why", "where", "setting", "held by"))


@pytest.mark.parametrize("row", MAP, ids=lambda row: row[0])
def test_a_row_of_the_map(row: list[str]) -> None:
    _, equation, functions, tests, metrics, checks = row
    assert equation
    assert [path for path, name in references(functions) if name] and "tests/" not in functions
    assert tests == "–" or all(path.startswith("tests/") and name for path, name in references(tests))
    assert checks == "–" or all(path.startswith("diagnose/") and name for path, name in references(checks))
    assert tests == "–" or references(tests)
    assert checks == "–" or references(checks)
    assert metrics == "–" or set(code_spans(metrics)) <= {metric.name for metric in METRICS}
    assert metrics == "–" or code_spans(metrics)


def test_the_map_has_every_equation() -> None:
    there = {
        (f"ops/{path.name}", name)
        for path in (SOURCES / "ops").glob("*.py")
        for name in names_in(path)
        if not name.startswith("_")
    }
    assert len(there) > 20
    assert there - {reference for row in MAP for reference in references(row[2])} == set()


def test_the_thirty_details_are_all_decided() -> None:
    assert sorted(int(row[0]) for row in DETAILS) == list(range(1, 31))
    for number, detail, what, where, setting, held_by in DETAILS:
        assert detail and what, number
        assert references(where), number
        assert held_by == "–" or references(held_by), number
        for key, default in (span.split(" = ") for span in code_spans(setting)):
            known = recipe.keys()[key].default
            assert default == (str(known).lower() if isinstance(known, bool) else str(known)), key


def test_metrics_are_those_of_the_schema() -> None:
    spec = importlib.util.spec_from_file_location("render_metrics", ROOT / "tools" / "render_metrics.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    assert page == module.render(), "run python tools/render_metrics.py"
    assert {metric.name for metric in METRICS} - set(code_spans(page)) == set()


def test_every_column_of_the_trace_is_described() -> None:
    columns = {
        name for schema in (step_schema(["<channel>"]), probe_schema(), sample_schema()) for name in schema.names
    }
    assert columns - set(code_spans((DOCS / "trace.md").read_text(encoding="utf-8"))) == set()


def test_the_gold_utility_is_what_the_page_says() -> None:
    table = rows(DOCS / "world.md", ("what", "constant", "gold"))
    assert len(table) == 7
    for _, constant, value in table:
        assert float(value.replace("−", "-")) == getattr(gold, constant.strip("`"))


# Links and paths


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=named)
def test_anchors_lead_to_headings(page: Path) -> None:
    links = re.findall(r"\]\(([\w./-]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    for target, anchor in links:
        text = (page.parent / target if target else page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")]), ids=named)
def test_no_page_names_a_place_on_some_machine(page: Path) -> None:
    assert (
        re.findall(r"(?<![\w.~])/(?:home|root|tmp|work|mnt|Users|private)\b|\.\./shared", page.read_text("utf-8")) == []
    )
