"""What is set against what, what the pairs say of the penalty, and which changes are proposed for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_run import World, make_run

from kedge.diagnose.changes import beyond_settings, changes
from kedge.diagnose.contrast import contrast_of, phrase_subject, subject_of
from kedge.diagnose.diagnosis import Diagnosis, diagnose, read_view
from kedge.diagnose.finding import Finding, Remedy
from kedge.diagnose.penalty import penalty
from kedge.diagnose.trials import Effect, Tried, conclusions, trial_command, trial_of
from kedge.diagnose.view import View, view_of
from kedge.trace.reader import Series, read_run

N = 12


def answers() -> dict[str, Any]:
    """Ten prompts on which the policy declines and the reference does not, one the other way round, one even."""
    own = np.array([1.0] * 10 + [0, 1])
    usual = np.array([0.0] * 10 + [1, 1])
    rng = np.random.default_rng(0)
    return {
        "step": 6, "feature/refusals": own, "reference/refusals": usual, "length": np.full(N, 9.0),
        "reference_tokens": np.full(N, 9.0), "tercile": np.arange(N) % 3, "score": rng.normal(1.5, 0.1, N),
        "reference_score": rng.normal(0.0, 0.1, N), "kl": rng.normal(6.0, 0.1, N),
        "reference_kl": rng.normal(-4.0, 0.1, N), "response": ["no sorry"] * 10 + ["at 8", "no sorry"],
        "reference_response": ["at 8"] * 10 + ["no sorry", "no"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> View:
    run = make_run(tmp_path_factory.mktemp("contrast") / "run", World(steps=9, beta=0.1, last_ratio=1.0))
    return replace(view_of(read_run(run), []), samples=(answers(),))


def test_an_answer_with_a_feature_against_one_without(view: View) -> None:
    """Prompt by prompt: the answer that declines first, whoever gave it; the prompt on which both do is left out."""
    sample, contrast = view.samples[0], contrast_of(view, "refusals")
    (pairs,) = contrast.pairs
    signs = [1] * 10 + [-1]
    for at, sign in enumerate(signs):
        assert pairs.score[at] == pytest.approx(sign * (sample["score"][at] - sample["reference_score"][at]))
        assert pairs.kl[at] == pytest.approx(sign * (sample["kl"][at] - sample["reference_kl"][at]))
    assert len(pairs.score) == 11 and pairs.beta == 0.1
    assert (contrast.more, contrast.less) == ("the answer with refusals", "the one without")


def test_a_phrase_is_looked_for_word_by_word(view: View) -> None:
    contrast = contrast_of(view, phrase_subject("sorry"))
    assert len(contrast.pairs[0].score) == 12 and contrast.more == 'the answer with "sorry"'
    hashed = replace(view, samples=({**view.samples[0], "response": [None] * N},))
    assert contrast_of(hashed, phrase_subject("sorry")).subject == "length"


def test_answers_as_a_whole(view: View) -> None:
    sample = {**view.samples[0]}
    sample["reference_kl"] = np.where(np.arange(N) < 9, sample["reference_kl"], sample["kl"])  # three are the same
    contrast = contrast_of(replace(view, samples=(sample,)), "")
    assert len(contrast.pairs[0].score) == 9 and contrast.less == "the reference's"


@pytest.mark.parametrize("subject", ["lists", phrase_subject("never said")])
def test_where_no_answers_differ_length_stands_in(subject: str, view: View) -> None:
    assert contrast_of(view, subject).subject == "length"


def test_the_first_finding_with_a_subject_decides(view: View) -> None:
    quiet, declines = Finding("beta", "fail", ""), Finding("refusals", "fail", "", subject="refusals")
    assert subject_of([quiet, declines], view) == "refusals"
    assert subject_of([quiet], view) == "", "answers are as long as the reference's"
    ratios = {"evaluation/length": Series(np.array([0, 6]), np.array([9.0, 18.0])),
              "evaluation/length_reference": Series(np.array([0, 6]), np.array([9.0, 9.0]))}  # fmt: skip
    assert subject_of([quiet], replace(view, metrics={**view.metrics, "evaluation": ratios})) == "length"
    assert subject_of([quiet], replace(view, samples=())) == "length"


def test_the_nats_times_beta_are_the_cost(view: View) -> None:
    said = " ".join(penalty(view, contrast_of(view, "refusals")))
    (pairs,) = contrast_of(view, "refusals").pairs
    charged = float(np.mean([max(one, 0.0) for one in pairs.kl]))
    assert f"by {pairs.kl.mean():.1f} nats more than the one without on average, and by {charged:.1f}" in said
    assert f"costs {0.1 * charged:.2f} reward" in said
    even = replace(
        view, samples=({**view.samples[0], "feature/refusals": np.ones(N), "reference/refusals": np.zeros(N)},)
    )
    assert "on average" not in " ".join(penalty(even, contrast_of(even, "refusals")))


# Changes


def found(*findings: Finding) -> Diagnosis:
    return Diagnosis("run", None, findings, (), {})


DECLINES = Finding(
    "feature_reward", "fail", "It declines.", strength=2.0, subject="refusals",
    remedies=(Remedy((), "other labels", "labels"), Remedy(("policy.kl.mode=fixed", "policy.kl.beta=0.2"), "x", "")),
)  # fmt: skip
MIX = Finding(
    "refusals", "warn", "More.", strength=0.9, remedies=(Remedy(("policy.pretraining_mix=0.5",), "mix", "slow"),)
)


def tried(*settings: str, seeds: int = 3, steps: int = 10, figure: str = "length", caused: bool = True) -> Tried:
    effect = Effect(figure, "tokens", 20.0, 12.0, -8.0, (-9.0, -7.0), (-8.5, -7.5), caused, False)
    truth = Effect("gold", "", 0.1, 0.3, 0.2, None, None, False, True)
    return Tried(settings, 4, steps, seeds, (effect, truth), ("said",))


def test_a_beta_comes_from_the_pairs_and_no_length_penalty_against_refusals(view: View) -> None:
    contrast = contrast_of(view, "refusals")
    first, second = changes(view, found(DECLINES, MIX), contrast)
    score = np.median(np.concatenate([one.score for one in contrast.pairs]))
    assert first.overrides == ("policy.kl.mode=fixed", "policy.kl.beta=0.3")
    assert second.overrides == ("policy.pretraining_mix=0.5",)
    (pairs,) = contrast.pairs
    nets = [score - 0.3 * max(kl, 0) for score, kl in zip(pairs.score, pairs.kl, strict=True)]
    assert f"to {np.mean(nets):+.2f} reward" in first.reward and score > 0
    assert f"= {pairs.score.mean() / 0.3:.1f} nats" in first.gradient and "pulls back" in first.gradient
    assert beyond_settings(found(DECLINES, MIX)) == ("other labels (costs labels)",)


def test_what_is_in_force_is_no_change(view: View) -> None:
    settled = replace(view, settings={"policy": {"kl": {"mode": "fixed", "beta": 0.1}}})
    trials = (tried("policy.kl.mode=fixed", "policy.kl.beta=0.3"),)
    first, _ = changes(settled, found(DECLINES, MIX), contrast_of(view, "refusals"), trials)
    assert first.overrides == ("policy.kl.beta=0.3",) and first.tried == trials[0]


def test_other_trials_displace_no_proposal(view: View) -> None:
    small, large = tried("policy.entropy_bonus=0.01", seeds=1), tried("policy.lam=0.9", seeds=5)
    kept = changes(view, found(DECLINES, MIX), contrast_of(view, "refusals"))
    shown = changes(view, found(DECLINES, MIX), contrast_of(view, "refusals"), (small, large))
    assert shown[:2] == kept
    assert [one.tried for one in shown[2:]] == [large, small]


def test_of_two_trials_that_with_more_forks_counts() -> None:
    small, large = tried("a.b=1", seeds=1, steps=3), tried("a.b=1", seeds=3, steps=18)
    assert trial_of(("a.b=1",), (small, large)) == large
    assert trial_of(("a.b=2",), (small, large)) is None


def test_conclusions_begin_with_what_the_finding_is_about() -> None:
    rows = (tried("a.b=1").effects[0], tried("a.b=1", figure="refusals").effects[0], tried("a.b=1").effects[1])
    said = conclusions(replace(tried("a.b=1"), effects=rows), "refusals")
    assert said[0] == "Tried: 10 steps from step 4, 3 pairs of forks, changed against unchanged."
    assert said[1] == "refusals 20 to 12, -8 [95% -9 to -7 over seeds]: caused"
    assert said[-1] == "gold (known to the built-in world alone) 0.1 to 0.3, +0.2"
    none = conclusions(tried("a.b=1", caused=False, seeds=1))
    assert "one pair of forks" in none[0] and "No figure is shown to have moved." in none[0]


def test_the_command_that_tries_it(tmp_path: Path) -> None:
    assert trial_command(tmp_path, [("a.b=1",)], 5) is None, "no checkpoint"
    for step in (0, 4, 8):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step:06d}" / "state.json").touch()
    command = trial_command(tmp_path, [("a.b=1", "c=2"), ("d=3",)], 5)
    assert command == f'kedge trial {tmp_path} --from 4 --arm "a.b=1 c=2" --arm "d=3"'
    assert trial_command(tmp_path, [], 5) is None


# Files


def test_holes_are_told(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", World(steps=9))
    assert read_view(path)[1] == ()
    (path / "trace" / "step-000004.parquet").unlink()
    metrics = path / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.open() if '"step": 8' not in line and '"step": 7' not in line))
    view, notes = read_view(path)
    assert notes == (
        "trace/ lacks policy steps 4.",
        "metrics.jsonl ends at policy step 6, trace/ at 8: the later metrics are missing.",
    )
    assert diagnose(view).findings
