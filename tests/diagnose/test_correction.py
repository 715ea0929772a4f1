"""The rule finds drift, leaves improvement alone, says when it cannot tell, and reads nothing but the trace."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import HEALTHY, World, make_run

import kedge.diagnose
from kedge.diagnose.correction import balancing_beta, propose, score_slope
from kedge.diagnose.margin import Pairs, bootstrap_interval, margins, sampled_pairs
from kedge.recipe import build
from kedge.trace.jsonl import keep_json_lines
from kedge.trace.reader import read_run
from kedge.trace.run_dir import RunDir

DRIFT = World(batch=6)


def overrides(path: Path) -> dict[str, str]:
    return dict(item.split("=") for item in propose(read_run(path)).overrides)


def test_drift_is_found_and_corrected(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", DRIFT)
    proposal = propose(read_run(path))
    assert (proposal.drift, proposal.status) == (True, "fail")
    settings = overrides(path)
    assert float(settings["policy.length_penalty"]) == 0.06  # the slope built into the probes
    # Score margin 1.2 over KL margins 7.5 and 10 nats balances at about 0.137; three times 0.05 is more.
    assert float(settings["policy.kl.beta"]) == 0.15
    recipe = build({}, proposal.overrides)
    assert (recipe.policy.length_penalty, recipe.policy.kl.beta, recipe.policy.kl.mode) == (0.06, 0.15, "fixed")
    evidence = {item.name: item for item in proposal.evidence}
    assert evidence["length over reference"].value == pytest.approx((2.5 + 2.125) / 2)
    assert evidence["score margin"].value == pytest.approx(1.2, abs=1e-5)
    assert evidence["KL margin"].value == pytest.approx(8.75, abs=0.2) and evidence["KL margin"].unit == "nats"
    assert proposal.words and proposal.trade_offs and "cause" not in " ".join(proposal.words)


def test_a_beta_that_must_rise_a_lot_is_capped(tmp_path: Path) -> None:
    assert float(overrides(make_run(tmp_path / "run", replace(DRIFT, kl_margin=2.0)))["policy.kl.beta"]) == 0.3
    high = make_run(tmp_path / "high", replace(DRIFT, beta=0.4, kl_margin=1.0))
    assert float(overrides(high)["policy.kl.beta"]) == 0.4  # never lowered


@pytest.mark.parametrize(
    "world",
    [
        HEALTHY,
        replace(DRIFT, last_ratio=1.1),  # the margin pays, length is flat
        replace(DRIFT, slope=-0.02),  # longer, but not because the reward pays for it
        replace(DRIFT, penalty=0.08),  # the penalty in force takes the margin away
    ],
    ids=["healthy", "flat", "unpaid", "penalised"],
)
def test_nothing_is_proposed_without_drift(tmp_path: Path, world: World) -> None:
    proposal = propose(read_run(make_run(tmp_path, replace(world, batch=6))))
    assert (proposal.drift, proposal.status, proposal.overrides, proposal.trade_offs) == (False, "ok", (), ())
    assert proposal.evidence and proposal.words


def test_a_margin_that_paid_while_length_rose_counts(tmp_path: Path) -> None:
    """Length rises to its end at step 3 and stays; the KL of verbose answers eats the margin later."""
    path = make_run(tmp_path, replace(DRIFT, steps=12, kl_margin=60.0))
    run = RunDir(path)
    text = run.metrics.read_text().replace('"evaluation/length": 10.0,', '"evaluation/length": 24.0,')
    run.metrics.write_text(text)
    keep_json_lines(run.metrics, lambda line: line["stage"] != "policy" or line["step"] < 99)
    assert margins(read_run(path))[-1].high < 0
    proposal = propose(read_run(path))
    assert proposal.drift and "paid while length rose" in proposal.words[0]


def test_too_little_to_tell(tmp_path: Path) -> None:
    few = propose(read_run(make_run(tmp_path / "few", replace(DRIFT, probes=7))))
    assert few.status == "not_checked" and "7 probe prompts" in few.words[0] and few.overrides == ()
    short = propose(read_run(make_run(tmp_path / "short", replace(DRIFT, steps=3))))
    assert short.status == "not_checked" and "2 probe steps" in short.words[0]
    RunDir.create(tmp_path / "empty")
    assert propose(read_run(tmp_path / "empty")).status == "not_checked"


def test_lengths_come_from_training_when_nothing_was_evaluated(tmp_path: Path) -> None:
    path = make_run(tmp_path, replace(DRIFT, batch=48))
    keep_json_lines(RunDir(path).metrics, lambda line: line["stage"] == "policy")
    proposal = propose(read_run(path))
    assert proposal.drift and "training steps" in proposal.evidence[0].note


def test_margins_by_hand(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, replace(DRIFT, penalty=0.01)))
    last = margins(run)[-1]
    assert (last.step, last.prompts, last.length) == (12, 16, 20)
    assert last.net == pytest.approx(1.2 - 0.05 * last.kl - 0.01 * 20, abs=1e-5)
    assert last.low <= last.net <= last.high and last.share_positive == 1
    assert last.signed == pytest.approx(last.net, abs=1e-5) and last.share_signed == 1
    terciles = [margins(run, tercile)[-1] for tercile in range(3)]
    assert sum(one.prompts for one in terciles) == 16
    assert sum(one.net * one.prompts for one in terciles) / 16 == pytest.approx(last.net)


def test_an_answer_the_policy_left_earns_no_margin_from_kl(tmp_path: Path) -> None:
    """KL 10 nats below the brief answer's: the pull back to the reference is not counted as pay."""
    world = replace(DRIFT, kl_margin=-10.0, beta=0.3, penalty=0.06, last_ratio=0.7)
    last = margins(read_run(make_run(tmp_path, world)))[-1]
    assert last.kl == pytest.approx(-10, abs=0.2) and last.kl_cost == 0
    assert last.net == pytest.approx(0, abs=1e-5)
    assert last.signed == pytest.approx(0.3 * 10, abs=0.06) and last.share_signed == 1


def pairs(score: list[float], kl: list[float], length: float = 10.0) -> Pairs:
    size = len(score)
    return Pairs(0, 0.05, 0.0, np.array(score), np.array(kl), np.full(size, length), np.zeros(size, int))


def test_slope_and_balance() -> None:
    assert score_slope([pairs([1.0, 3.0], [1, 1])]) == 0.2
    assert balancing_beta([pairs([1.0, 2.0, 9.0], [10, 10, 10])]) == pytest.approx(0.2)
    assert balancing_beta([pairs([-1.0, -2.0, 9.0], [10, 10, 10])]) == 0
    assert balancing_beta([pairs([1.0, 2.0, 9.0], [0, -1, 0])]) == np.inf


def test_interval_is_seeded_and_close_to_theory() -> None:
    values = np.random.default_rng(3).normal(1.0, 2.0, 400)
    low, high = bootstrap_interval(values, seed=1)
    assert (low, high) == bootstrap_interval(values, seed=1)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_diagnosis_never_opens_what_the_world_knows(tmp_path: Path) -> None:
    """An audit hook fails on any file under truth/, and poisoned gold changes nothing."""
    path = make_run(tmp_path / "run", DRIFT)
    RunDir(path).truth.write_text("not even json")
    code = """
import sys
from kedge.diagnose.correction import propose
from kedge.diagnose.health import marks
from kedge.diagnose.ledger import ledger
from kedge.diagnose.margin import margins
from kedge.trace.reader import read_run

def watch(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and "truth" in str(arguments[0]):
        raise AssertionError(arguments[0])

sys.addaudithook(watch)
run = read_run(sys.argv[1])
assert propose(run).drift and ledger(run) and margins(run) and marks(run)
"""
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)


def test_diagnosis_names_nothing_of_the_world() -> None:
    """But for trials, whose files mark what a world knows as such; no check reads those."""
    for file in Path(kedge.diagnose.__path__[0]).rglob("*.py"):
        if file.name == "trials.py":
            continue
        tree = ast.parse(file.read_text())
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not any(name.startswith(("kedge.report", "kedge.desk", "kedge.recipe")) for name in names)
                assert file.parent.name != "checks" or "kedge.diagnose.trials" not in names, file
            if isinstance(node, ast.Attribute):
                assert node.attr != "truth", file
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                assert "truth" not in node.value and "gold" not in node.value, (file, node.value)


def test_a_margin_of_free_text_by_hand() -> None:
    """Policy against reference on five prompts: more, less, as much of the feature, one unknown, one more."""
    sample = {
        "step": 12,
        "score": np.array([1.0, 0.5, 9.0, 9.0, 0.0]),
        "reference_score": np.array([0.0, 1.0, 0.0, 0.0, 0.5]),
        "kl": np.array([2.0, 1.0, 9.0, 9.0, 3.0]),
        "reference_kl": np.array([-1.0, -2.0, 0.0, 0.0, np.nan]),
        "length": np.array([20, 8, 9, 9, 5]),
        "reference_tokens": np.array([10, 12, 9, 9, 5]),
        "tercile": np.array([0, 1, 2, 2, 0]),
    }
    feature, usual = np.array([3.0, 0.0, 1.0, np.nan, 2.0]), np.array([1.0, 1.0, 1.0, 0.0, 1.0])
    pairs = sampled_pairs(sample, feature, usual, beta=0.1, penalty=0.01)
    assert pairs.score.tolist() == [1.0, 0.5] and pairs.kl.tolist() == [3.0, -3.0]
    assert pairs.length.tolist() == [10, 4] and pairs.tercile.tolist() == [0, 1]
    assert pairs.net.tolist() == pytest.approx([1 - 0.3 - 0.1, 0.5 - 0.04])
