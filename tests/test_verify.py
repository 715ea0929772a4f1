"""`kedge verify`: its rows, its output and exit codes, what it judges right, and the page that shows a run of it."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from kedge import cli
from kedge.experiment.verify import checks
from kedge.experiment.verify.checks import CHECKS, FAR, MUST_FAIL, TASK, Check, End, judged
from kedge.recipe.sections import Policy

ROOT = Path(__file__).parents[1]
VERIFY = ROOT / "src" / "kedge" / "experiment" / "verify"
NAMES = [check.name for check in CHECKS]


def ending(logprobs: Tensor, **changed: object) -> Check:
    """A check that ended at `logprobs` and should have ended at pi*."""
    check = Check("given", "optimiser", "given", lambda: End(TASK.optimum, logprobs, TASK.beta))
    return replace(check, **changed)  # type: ignore[arg-type]


# Rows


def test_every_optimiser_of_the_recipe_has_a_row() -> None:
    methods = get_args(Policy.model_fields["method"].annotation)
    assert "ppo" in methods
    assert set(methods) - {check.name for check in CHECKS if check.kind == "optimiser"} == set()


def test_names_differ_and_only_controls_must_fail() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert all((check.expected == MUST_FAIL) == (check.kind == "control") for check in CHECKS)


def test_the_judge_of_a_row() -> None:
    """What is right is near pi* in every response; a control is right when it is far away."""
    at_reference = TASK.reference_logprobs
    nudged = (TASK.optimum + torch.linspace(-0.2, 0.2, TASK.optimum.shape[1])).log_softmax(-1)
    for logprobs, near, far in ((TASK.optimum, True, False), (at_reference, False, True), (nudged, False, False)):
        assert judged(ending(logprobs), ending(logprobs).run(), 0.0).ok is near
        control = ending(logprobs, expected=MUST_FAIL)
        assert judged(control, control.run(), 0.0).ok is far
    lost = judged(ending(at_reference * float("nan")), End(TASK.optimum, at_reference * float("nan"), 1.0), 0.0)
    assert not lost.ok


def test_the_figures_of_a_row() -> None:
    """The gap is the difference of the objectives, by Task.objective."""
    row = judged(ending(TASK.reference_logprobs), ending(TASK.reference_logprobs).run(), 0.0)
    best, start = TASK.objective(TASK.optimum), TASK.objective(TASK.reference_logprobs)
    assert row.objective_gap == pytest.approx(float(best - start))
    assert row.gap_share == pytest.approx(1)
    assert row.kl == 0 and row.kl_gap == pytest.approx(float(TASK.kl(TASK.optimum).mean()))
    assert row.tv == pytest.approx(TASK.distance(TASK.reference)) and row.tv > FAR


@pytest.mark.slow
@pytest.mark.timeout(900)  # wall clock, on a machine that does other work
def test_every_row_is_as_it_must_be_within_two_minutes() -> None:
    began = time.process_time()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    failed = [row for row in checks.verify(CHECKS) if not row.ok]
    torch.set_num_threads(threads)
    assert failed == []
    assert time.process_time() - began < 120


# The command


def test_json_has_a_row_for_each_check_and_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--only", "best_of_n", "--only", "k1_reward", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"rows", "ok"} and result["ok"] is True
    assert [row["name"] for row in result["rows"]] == ["best_of_n", "k1_reward"]
    for row in result["rows"]:
        assert {"name", "tv", "objective_gap", "expected", "ok"} <= set(row)
        assert row["ok"] is True and 0 <= row["tv"] < 0.025


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[[Check], None]:
    """Puts one check in the place of all."""
    return lambda check: monkeypatch.setattr(checks, "CHECKS", (check,))


@pytest.mark.parametrize(
    ("logprobs", "code"), [(TASK.optimum, 0), (TASK.reference_logprobs, 1)], ids=["right", "wrong"]
)
def test_the_exit_code_says_whether_all_is_well(
    given: Callable[[Check], None], logprobs: Tensor, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    given(ending(logprobs))
    assert cli.main(["verify"]) == code
    shown = capsys.readouterr()
    assert ("1 of 1 rows as they must be" if code == 0 else "0 of 1 rows as they must be, not given") in shown.out
    assert ("FAIL" in shown.out) == bool(code)
    assert "verify" in shown.err and "rows" not in shown.err, "progress goes to stderr, the result to stdout"
    assert cli.main(["verify", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["ok"] is (code == 0)


def test_an_unknown_row_is_refused_with_the_one_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--only", "rlo"]) == 2
    assert capsys.readouterr().err == "error: --only rlo: no row has this name -> did you mean rloo?\n"
    assert cli.main(["verify", "--only", "zzz"]) == 2
    assert "choose from ppo, a2c" in capsys.readouterr().err


# Independence and documentation


@pytest.mark.parametrize("module", ["enumerable", "optima"])
def test_the_answers_know_nothing_of_what_they_judge(module: str) -> None:
    tree = ast.parse((VERIFY / f"{module}.py").read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    ours = {name for name in imported if name.startswith("kedge")}
    assert ours <= {"kedge.experiment.verify.enumerable"}


def test_the_page_shows_the_commands_rows() -> None:
    spec = importlib.util.spec_from_file_location("render_verify", ROOT / "tools" / "render_verify.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8").partition(module.MARK)[2]
    cells = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in page.splitlines() if line.startswith("| `")]
    expected = [(f"`{check.name}`", module.escaped(check.what), module.escaped(check.expected)) for check in CHECKS]
    assert [tuple(row[:3]) for row in cells] == expected, "run python tools/render_verify.py"
    assert all(row[-1] == "yes" for row in cells)
