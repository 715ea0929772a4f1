"""Rows of other trainers: what is written and read back is the trainer's own advantage, split exactly.

Each trainer's advantage comes from loops over plain numbers, written from its published formula and run in float32.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.errors import InputError
from kedge.trace.foreign import Conventions, Rows, as_record, padded, to_array
from kedge.trace.reader import Part, StepTrace, read_step
from kedge.trace.run_dir import RunDir
from kedge.trace.writer import step_table, write_table

F = np.float32
UNIT = 2.0**-24  # half a unit in the last place of float32
FEW = settings(max_examples=40, deadline=None)


# A batch


@dataclass(frozen=True)
class Batch:
    """Random responses: [B, T] with a slot behind the longest, empty ones and holes where asked for."""

    mask: np.ndarray
    group: np.ndarray
    scores: dict[str, np.ndarray]
    old: np.ndarray
    reference: np.ndarray
    values: np.ndarray


@st.composite
def batches(draw: st.DrawFn, *, empty: bool = True, names: int = 3) -> Batch:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, longest = sum(sizes), draw(st.integers(1, 9))
    lengths = rng.integers(0 if empty else 1, longest + 1, count)
    width = longest + draw(st.integers(0, 2))
    mask = np.arange(width) < lengths[:, None]
    if draw(st.booleans()):  # tool turns: holes, but never the last token
        holes = (rng.random(mask.shape) < 0.3) & (np.arange(width) < lengths[:, None] - 1)
        mask &= ~holes
    kind = draw(st.sampled_from(["normal", "binary", "equal", "large"]))
    scores = {}
    for index in range(draw(st.integers(1, names))):
        score = rng.normal(0, 1, count)
        score = {"normal": score, "binary": (score > 0) * 1.0, "equal": score * 0 + 0.1, "large": 50 + 5 * score}[kind]
        scored = rng.random(count) < draw(st.sampled_from([1.0, 0.8]))
        scores[f"rule_{index}"] = np.where(scored, score, np.nan).astype(F)
    old = -rng.exponential(1.0, mask.shape).astype(F)
    reference = (old - rng.normal(0.05, 0.3, mask.shape)).astype(F)
    values = rng.normal(0, 1, mask.shape).astype(F)
    return Batch(mask, np.repeat(np.arange(len(sizes)), sizes), scores, old, reference, values)


def through_disk(rows: Rows, conventions: Conventions, folder: Path) -> StepTrace:
    """Written and read as a run's step is, the digest checked."""
    run = RunDir(folder)
    run.trace.mkdir(exist_ok=True)
    path = run.step_file(rows.step)
    write_table(step_table(as_record(rows, conventions)), path)
    step = read_step(path)
    step.check_digest()
    return step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


def rounding(step: StepTrace) -> np.ndarray:
    """[B, T] what float32 may lose of an advantage: of the terms that are added up and cancel, over the scale."""
    rewards = np.abs(step.rewards).sum(axis=1)
    values = np.abs(step.values).max(axis=1, initial=0)
    terms = (np.abs(step.weights) * (rewards + values)).sum(axis=1) + np.abs(step.shift)
    return (64 * UNIT * terms / step.scale)[:, None] + 1e-5 * np.abs(step.advantage()) + 1e-5


def assert_exact(step: StepTrace, advantage: np.ndarray) -> None:
    """The parts sum to the trainer's advantage."""
    mask = step.response_mask
    assert set(step.parts()) >= {Part(name, source) for name in step.channels for source in ("reward", "critic")}
    total = sum(step.parts().values())
    wanted = np.where(mask, advantage[:, : mask.shape[1]], 0)
    assert (np.abs(total - wanted) <= rounding(step)).all(), np.abs(total - wanted).max()


def spread(per_response: list[Any], mask: np.ndarray) -> np.ndarray:
    return np.where(mask, np.array(per_response, dtype=F)[:, None], F(0))


# Trainers


def paid(scores: Mapping[str, np.ndarray], weights: Mapping[str, float], row: int) -> np.float32:
    """sum_k w_k r_k; what was not scored does not count."""
    total = F(0)
    for name, score in scores.items():
        if not math.isnan(score[row]):
            total = F(total + F(weights.get(name, 1.0)) * score[row])
    return total


def divergence(batch: Batch, row: int) -> np.float32:
    total = F(0)
    for t in range(batch.mask.shape[1]):
        if batch.mask[row, t]:
            total = F(total + (batch.old[row, t] - batch.reference[row, t]))
    return total


def trl_grpo(rewards: list[Any], group: np.ndarray, *, scale: str, epsilon: float = 1e-4) -> list[Any]:
    """TRL's GRPO: (r - mean of the group) / (deviation over n - 1 + 1e-4), of the group or of the batch."""
    found = []
    batch = np.std(rewards, ddof=1) if len(rewards) > 1 else 0.0
    for row, reward in enumerate(rewards):
        others = [rewards[other] for other in range(len(rewards)) if group[other] == group[row]]
        mean = sum(others, start=F(0)) / F(len(others))
        square = sum(((other - mean) ** 2 for other in others), start=F(0))
        deviation = math.sqrt(square / (len(others) - 1)) if len(others) > 1 else 0.0
        divisor = {"group": deviation + epsilon, "batch": batch + epsilon, "none": 1.0}[scale]
        found.append(F(F(reward - mean) / F(divisor)))
    return found


def leave_one_out(rewards: list[Any], group: np.ndarray) -> list[Any]:
    """r less the mean of the others to the same prompt; alone, r."""
    found = []
    for row, reward in enumerate(rewards):
        others = [rewards[other] for other in range(len(rewards)) if group[other] == group[row] and other != row]
        found.append(F(reward - sum(others, start=F(0)) / F(max(len(others), 1))))
    return found


def normalised(advantages: list[Any], epsilon: float = 1e-4) -> list[Any]:
    """TRL's RLOO with normalize_advantages: over the batch's responses, deviation over n - 1."""
    mean, deviation = np.mean(advantages), np.std(advantages, ddof=1)
    return [F((one - mean) / (deviation + epsilon)) for one in advantages]


def ppo(batch: Batch, reward: np.ndarray, *, gamma: float, lam: float) -> np.ndarray:
    """GAE over the policy's tokens, holes carried over, in float32."""
    found = np.zeros(reward.shape, F)
    for row in range(len(reward)):
        ahead, following = F(0), F(0)
        for t in reversed(np.flatnonzero(batch.mask[row])):
            delta = F(reward[row, t] + F(gamma) * following - batch.values[row, t])
            ahead = F(delta + F(gamma) * F(lam) * ahead)
            following, found[row, t] = batch.values[row, t], ahead
    return found


def whitened(advantage: np.ndarray, mask: np.ndarray, *, correction: int = 1, epsilon: float = 1e-8) -> np.ndarray:
    """TRL's masked_whiten: variance over n - 1, epsilon inside the root."""
    values = advantage[mask].astype(np.float64)
    variance = ((values - values.mean()) ** 2).sum() / max(len(values) - correction, 1)
    return np.where(mask, (advantage - values.mean()) / math.sqrt(variance + epsilon), 0).astype(F)


def at_last(batch: Batch, amounts: list[Any]) -> np.ndarray:
    reward = np.zeros(batch.mask.shape, F)
    for row, amount in enumerate(amounts):
        tokens = np.flatnonzero(batch.mask[row])
        if len(tokens):
            reward[row, tokens[-1]] = amount
    return reward


# What the conventions explain


@FEW
@given(batches(), st.sampled_from(["group", "batch", "none"]), st.lists(st.floats(-2, 2, width=16), max_size=3))
def test_grpo_as_trl_has_it(folder: Path, batch: Batch, scale: str, given_weights: list[float]) -> None:
    weights = dict(zip(batch.scores, given_weights, strict=False))
    rewards = [paid(batch.scores, weights, row) for row in range(len(batch.mask))]
    advantage = np.array(trl_grpo(rewards, batch.group, scale=scale), dtype=F)
    named = {"group": "group mean and deviation", "batch": "group mean and batch", "none": "group mean"}
    conventions = Conventions(
        "trl 1.16.0 GRPO", kl="loss", kl_estimator="k3", beta=0.04, normalisation=named[scale], epsilon=1e-4
    )
    rows = Rows(
        3,
        batch.mask,
        batch.scores,
        weights,
        group=batch.group,
        old_logprob=batch.old,
        reference_logprob=batch.reference,
        advantage=advantage,
    )
    step = through_disk(rows, conventions, folder)
    names = ["score"] if len(batch.scores) == 1 else list(batch.scores)
    assert list(step.channels) == [*names, "kl"]
    assert not step.weights[:, -1].any() and np.allclose(step.loss_beta, 0.04)
    assert_exact(step, spread(list(advantage), batch.mask))


@FEW
@given(batches(), st.floats(0, 0.5), st.booleans())
def test_rloo_as_trl_has_it(folder: Path, batch: Batch, beta: float, batch_wide: bool) -> None:
    rewards = [F(paid(batch.scores, {}, row) - F(beta) * divergence(batch, row)) for row in range(len(batch.mask))]
    found = leave_one_out(rewards, batch.group)
    if batch_wide and len(found) > 1:
        found = normalised(found)
    conventions = Conventions(
        "trl 1.16.0 RLOO",
        kl="reward",
        kl_estimator="k1",
        beta=beta,
        normalisation="leave one out and batch" if batch_wide else "leave one out",
        epsilon=1e-4,
    )
    rows = Rows(
        0,
        batch.mask,
        batch.scores,
        group=batch.group,
        old_logprob=batch.old,
        reference_logprob=batch.reference,
        advantage=np.array(found, dtype=F),
    )
    step = through_disk(rows, conventions, folder)
    assert step.channels[-1] == "kl" and np.allclose(step.weights[:, -1], -beta)
    assert_exact(step, spread(found, batch.mask))


@FEW
@given(
    batches(names=1),
    st.floats(0, 0.5),
    st.sampled_from([1.0, 0.99, 0.5]),
    st.sampled_from([1.0, 0.95, 0.0]),
    st.sampled_from(["k1", "k2", "k3", "abs"]),
    st.booleans(),
)
def test_ppo_with_a_critic(
    folder: Path, batch: Batch, beta: float, gamma: float, lam: float, estimator: str, whiten: bool
) -> None:
    k1 = (batch.old - batch.reference).astype(np.float64)
    charged = {"k1": k1, "k2": k1**2 / 2, "k3": np.exp(-k1) - 1 + k1, "abs": np.abs(k1)}[estimator].astype(F)
    reward = at_last(batch, [paid(batch.scores, {}, row) for row in range(len(batch.mask))])
    reward = np.where(batch.mask, reward - F(beta) * charged, 0).astype(F)
    advantage = ppo(batch, reward, gamma=gamma, lam=lam)
    if whiten and batch.mask.any():
        advantage = whitened(advantage, batch.mask)
    conventions = Conventions(
        "a PPO",
        gamma,
        lam,
        kl="reward",
        kl_estimator=estimator,
        beta=beta,
        normalisation="batch" if whiten else "none",
        critic=True,
    )
    rows = Rows(
        0,
        batch.mask,
        batch.scores,
        old_logprob=batch.old,
        reference_logprob=batch.reference,
        values=batch.values,
        advantage=advantage,
    )
    step = through_disk(rows, conventions, folder)
    assert step.channels == ("score", "kl", "critic") and step.critic == "scalar"
    assert_exact(step, advantage)


@FEW
@given(batches(names=1, empty=False), st.sampled_from([1.0, 0.99]), st.sampled_from([1.0, 0.95, 0.5]))
def test_a_score_in_the_slot_after_the_last_token(folder: Path, batch: Batch, gamma: float, lam: float) -> None:
    """TRL's PPO puts it there, with a value of its own, where the response leaves room for it."""
    count, width = batch.mask.shape
    advantage = np.zeros((count, width), F)
    for row in range(count):
        places = list(np.flatnonzero(batch.mask[row]))
        tokens = len(places)
        score = paid(batch.scores, {}, row)
        if places[-1] + 1 < width:
            places.append(places[-1] + 1)
        ahead, following = F(0), F(0)
        for number, t in reversed(list(enumerate(places))):
            reward = score if number == len(places) - 1 else F(0)
            delta = F(reward + F(gamma) * following - batch.values[row, t])
            ahead = F(delta + F(gamma) * F(lam) * ahead)
            following = batch.values[row, t]
            if number < tokens:
                advantage[row, t] = ahead
    conventions = Conventions(
        "trl 1.12.0 PPO", gamma, lam, kl="none", normalisation="none", score_position="after", critic=True
    )
    rows = Rows(0, batch.mask, batch.scores, values=batch.values, advantage=advantage)
    step = through_disk(rows, conventions, folder)
    assert step.channels == ("score", "critic")
    assert_exact(step, advantage)


@FEW
@given(batches(), st.floats(0, 0.5))
def test_a_baseline_of_the_score_alone(folder: Path, batch: Batch, beta: float) -> None:
    """OpenRLHF's RLOO: leave one out of the score, at the last token, and the KL from each token on."""
    scores = leave_one_out([paid(batch.scores, {}, row) for row in range(len(batch.mask))], batch.group)
    reward = at_last(batch, scores) - F(beta) * np.where(batch.mask, batch.old - batch.reference, 0)
    advantage = ppo(replace(batch, values=np.zeros_like(batch.values)), reward.astype(F), gamma=1.0, lam=1.0)
    conventions = Conventions(
        "openrlhf RLOO", kl="reward", kl_estimator="k1", beta=beta, kl_credit="to go", normalisation="leave one out"
    )
    rows = Rows(
        0,
        batch.mask,
        batch.scores,
        group=batch.group,
        old_logprob=batch.old,
        reference_logprob=batch.reference,
        advantage=advantage,
    )
    step = through_disk(rows, conventions, folder)
    assert "rest" not in step.channels
    assert_exact(step, advantage)


@FEW
@given(batches(names=1), st.sampled_from([1.0, 0.97]))
def test_returns_whitened_without_a_critic(folder: Path, batch: Batch, gamma: float) -> None:
    """REINFORCE++; the batch's deviation is that of tokens on other machines, too, so that no row here tells it."""
    reward = at_last(batch, [paid(batch.scores, {}, row) for row in range(len(batch.mask))])
    returns = ppo(replace(batch, values=np.zeros_like(batch.values)), reward, gamma=gamma, lam=1.0)
    advantage = np.where(batch.mask, (returns - F(0.37)) / F(1.9), 0).astype(F)
    conventions = Conventions("verl REINFORCE++", gamma, kl="none", normalisation="batch", critic=False)
    step = through_disk(Rows(0, batch.mask, batch.scores, advantage=advantage), conventions, folder)
    assert step.channels == ("score",) and "values" in step.absent
    assert_exact(step, advantage)


@pytest.mark.parametrize("reference", ["n", "one's own reward"])
def test_what_trainers_do_differently_is_told_by_their_advantage(folder: Path, reference: str) -> None:
    """Deviations over n instead of n - 1 (open-instruct), and groups of one that keep their reward (veRL)."""
    mask, rewards = np.ones((3, 2), bool), [1.0, 3.0, 5.0]
    if reference == "n":
        group, advantage = [0, 0, 0], [-2 / math.sqrt(8 / 3), 0.0, 2 / math.sqrt(8 / 3)]
    else:
        group, advantage = [0, 0, 1], [-1 / math.sqrt(2), 1 / math.sqrt(2), 5.0]
    conventions = Conventions("any", kl="none", normalisation="group mean and deviation")
    rows = Rows(0, mask, {"score": np.array(rewards)}, group=np.array(group), advantage=np.array(advantage))
    step = through_disk(rows, conventions, folder)
    assert step.channels == ("score",)
    assert np.allclose(step.advantage(), np.array(advantage)[:, None], atol=1e-6)


# What they do not


NORMALISATIONS = ("none", "group mean", "group mean and deviation", "group mean and batch", "leave one out",
                  "leave one out and batch", "batch", "unknown")  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    batches(),
    st.sampled_from(NORMALISATIONS),
    st.sampled_from([1.0, 0.99, 0.0]),
    st.sampled_from([1.0, 0.95, 0.3]),
    st.sampled_from(["reward", "loss", "none", "unknown"]),
    st.sampled_from(["to go", "response"]),
    st.sampled_from(["last", "after"]),
    st.sampled_from([1e-3, 1.0, 300.0]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_any_advantage_is_kept(
    folder: Path,
    batch: Batch,
    normalisation: str,
    gamma: float,
    lam: float,
    kl: str,
    credit: str,
    position: str,
    size: float,
    values: bool,
    seed: int,
) -> None:
    """Whatever the trainer did, the parts sum to its advantage; what they do not explain is the rest."""
    advantage = np.random.default_rng(seed).normal(0, size, batch.mask.shape).astype(F)
    grouped = normalisation.startswith(("group", "leave"))
    if grouped and credit == "response":
        gamma = lam = 1.0
    conventions = Conventions(
        "any",
        gamma,
        lam,
        kl=kl,
        kl_estimator="k1",
        beta=0.1,
        kl_credit=credit,
        normalisation=normalisation,
        score_position=position,
        epsilon=1e-6,
    )
    rows = Rows(
        0,
        batch.mask,
        batch.scores,
        group=batch.group,
        old_logprob=batch.old,
        reference_logprob=batch.reference,
        values=batch.values if values and not grouped else None,
        advantage=advantage,
    )
    step = through_disk(rows, conventions, folder)
    assert_exact(step, advantage)
    if "rest" in step.channels:
        assert step.channels[-1] == "rest"
        assert not step.rewards[..., -1].any() and (step.weights[:, -1] == 1).all()


def test_the_rest_is_what_was_not_recorded(folder: Path) -> None:
    """Two responses to one prompt, scores 1 and 3, and 0.5 that nobody recorded for the first."""
    conventions = Conventions("any", kl="none", normalisation="group mean")
    rows = Rows(0, np.ones((2, 2), bool), {"score": np.array([1.0, 3.0])}, group=np.zeros(2), advantage=[-0.75, 0.75])
    step = through_disk(rows, conventions, folder)
    assert step.channels == ("score", "rest")
    parts = step.parts()
    score = parts[Part("score", "reward")] + parts[Part("score", "critic")]
    assert np.allclose(score, [[-1, -1], [1, 1]])
    assert np.allclose(parts[Part("rest", "critic")], [[0.25, 0.25], [-0.25, -0.25]])


def test_a_wrong_convention_leaves_a_rest(folder: Path) -> None:
    """An advantage over the group's deviation that is said to be none."""
    rewards = np.array([0.0, 1.0, 2.0])
    rows = Rows(0, np.ones((3, 2), bool), {"score": rewards}, group=np.zeros(3), advantage=(rewards - 1) / 2)
    assert "rest" in through_disk(rows, Conventions("any", kl="none", normalisation="group mean"), folder).channels


def test_long_responses_keep_their_rest(folder: Path) -> None:
    """Values solved backwards over 4,000 tokens do not add up their rounding."""
    rng = np.random.default_rng(0)
    advantage = rng.normal(1, 1, (2, 4000)).astype(F)
    conventions = Conventions("any", 1.0, 0.95, kl="none", normalisation="none")
    step = through_disk(
        Rows(0, np.ones((2, 4000), bool), {"score": [1.0, 0.0]}, advantage=advantage), conventions, folder
    )
    assert np.abs(step.advantage() - advantage).max() < 1e-4


# Without an advantage


def test_a_known_normalisation_gives_the_advantage(folder: Path) -> None:
    """Scores 1, 2, 6 of one prompt: mean 3, deviation over n - 1 of sqrt(7)."""
    conventions = Conventions("any", kl="none", normalisation="group mean and deviation", epsilon=0.5)
    rows = Rows(0, np.ones((3, 2), bool), {"score": [1.0, 2.0, 6.0]}, group=[7, 7, 7])
    step = through_disk(rows, conventions, folder)
    wanted = np.array([-2.0, -1.0, 3.0]) / (math.sqrt(7) + 0.5)
    assert np.allclose(step.advantage(), wanted[:, None], atol=1e-6)
    assert "advantage" not in step.absent


@pytest.mark.parametrize(
    "changes",
    [
        {"normalisation": "unknown"},
        {"kl": "unknown"},
        {"kl": "reward", "kl_estimator": "k1", "beta": 0.1},  # and no log-probabilities
        {"normalisation": "batch"},  # and nobody says whether there is a critic
        {"normalisation": "batch", "critic": True},
    ],
)
def test_what_cannot_be_derived_is_absent(folder: Path, changes: dict[str, Any]) -> None:
    given = {"kl": "none", "normalisation": "group mean", **changes}
    rows = Rows(0, np.ones((2, 2), bool), {"score": [1.0, 3.0]}, group=[0, 0])
    step = through_disk(rows, Conventions("any", **given), folder)
    assert "advantage" in step.absent
    assert np.allclose(step.advantage(), [[1, 1], [3, 3]])  # the channels, with nothing taken off


# What is absent


def test_what_the_trainer_does_not_tell_is_absent(folder: Path) -> None:
    step = through_disk(Rows(0, np.ones((2, 3), bool), {}, advantage=[0.5, -0.5]), Conventions("any"), folder)
    assert step.channels == ("rest",)
    assert step.absent == {
        "behaviour_logprob", "old_logprob", "reference_logprob", "new_logprob", "old_eos_logprob",
        "reference_eos_logprob", "entropy", "active", "ended", "values", "group", "beta", "score",
    }  # fmt: skip
    assert all(np.isnan(column).all() for column in step.tokens.values())
    assert np.isnan(step.loss_beta).all()
    assert step.response_ids is None and step.prompts == (None, None)
    assert np.allclose(step.advantage(), [[0.5] * 3, [-0.5] * 3])


def test_what_it_tells_comes_back(folder: Path) -> None:
    rng = np.random.default_rng(1)
    mask = np.array([[True, True, True], [True, True, False]])
    columns = {
        name: rng.normal(-1, 0.3, mask.shape)
        for name in ("behaviour_logprob", "old_logprob", "reference_logprob", "new_logprob", "old_eos_logprob",
                     "reference_eos_logprob", "entropy")
    }  # fmt: skip
    conventions = Conventions(
        "any", kl="loss", kl_estimator="k3", beta=0.2, normalisation="group mean", clip=(0.2, 0.28), epochs=2,
        minibatches=4, aggregation="token_mean",
    )  # fmt: skip
    rows = Rows(
        5, mask, {"accuracy": [1.0, 0.0]}, group=["a", "a"], prompts=["p", "p"], responses=["x", "y"],
        prompt_ids=[[0, 7, 8]] * 2, prompt_mask=[[False, True, True]] * 2, response_ids=[[1, 2, 3], [4, 5, 0]],
        ended=[True, False], active=mask & [[True, False, True]], beta=0.3, policy_version=4, **columns,
    )  # fmt: skip
    step = through_disk(rows, conventions, folder)
    for name, column in columns.items():
        assert np.allclose(step.tokens[name][mask], column[mask], atol=1e-6)
    assert step.absent == {"values"} and step.channels == ("score", "kl")
    assert step.group.tolist() == [0, 0] and step.ended.tolist() == [True, False]
    assert step.active.tolist() == [[True, False, True], [True, False, False]]
    assert np.allclose(step.loss_beta, 0.3)
    assert step.learning == {
        "clip": 0.2, "clip_high": 0.28, "epochs": 2, "minibatches": 4, "aggregation": "token_mean", "kl_loss": "k3",
    }  # fmt: skip
    assert step.response_ids is not None and step.response_ids.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert step.prompts == ("p", "p") and step.responses == ("x", "y")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"prompts": ["a", "b", "a"]}, [0, 1, 0]),
        (
            {"prompt_ids": [[0, 5], [7, 5], [9, 5]], "prompt_mask": [[False, True], [True, True], [False, True]]},
            [0, 1, 0],
        ),
        ({"group": ["x", "y", "x"], "prompts": ["a", "a", "a"]}, [0, 1, 0]),
        ({"group": [40, 2, 40]}, [40, 2, 40]),
    ],
)
def test_responses_to_one_prompt(given: dict[str, Any], wanted: list[int]) -> None:
    rows = Rows(0, np.ones((3, 1), bool), {"score": [1.0, 2.0, 3.0]}, **given)
    record = as_record(rows, Conventions("any"))
    assert record.group.tolist() == wanted and "group" not in record.absent


@pytest.mark.parametrize(
    ("stated", "weight", "loss"),
    [
        ({"kl": "reward", "kl_estimator": "k1", "beta": 0.1}, -0.1, 0.0),
        ({"kl": "loss", "kl_estimator": "k3", "beta": 0.1}, 0.0, 0.1),
        ({"kl": "none"}, 0.0, 0.0),
        ({"kl": "unknown", "beta": 0.1}, 0.0, math.nan),
        ({"kl": "reward", "kl_estimator": "unknown", "beta": 0.1}, 0.0, 0.0),
        ({"kl": "reward", "kl_estimator": "k1"}, 0.0, 0.0),
    ],
)
def test_where_the_kl_is_charged(stated: dict[str, Any], weight: float, loss: float) -> None:
    given = np.full((1, 2), -1.0)
    rows = Rows(0, np.ones((1, 2), bool), {"score": [1.0]}, old_logprob=given, reference_logprob=given - 0.5)
    record = as_record(rows, Conventions("any", **stated))
    assert record.channels == ("score", "kl")
    assert np.allclose(record.rewards[..., 1], 0.5) and np.allclose(record.weights[:, 1], weight)
    assert np.allclose(record.loss_beta, loss, equal_nan=True)
    assert ("beta" in record.absent) == (not Conventions("any", **stated).charged)


# What is odd


def test_numbers_that_are_not_finite(folder: Path) -> None:
    """Nothing scored pays nothing; a log-probability of -inf stays in its column."""
    old = np.array([[-1.0, -np.inf], [-1.0, np.nan]])
    rows = Rows(
        0, np.ones((2, 2), bool), {"score": [np.nan, np.inf]}, group=[0, 0], old_logprob=old,
        reference_logprob=np.full((2, 2), -2.0), advantage=[0.0, 0.0],
    )  # fmt: skip
    conventions = Conventions("any", kl="none", normalisation="group mean")
    step = through_disk(rows, conventions, folder)
    assert not step.rewards[..., 0].any() and not step.advantage().any()
    assert np.isneginf(step.tokens["old_logprob"][0, 1]) and np.isnan(step.tokens["old_logprob"][1, 1])
    assert step.rewards[0, :, 1].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e60])
def test_an_advantage_that_is_not_finite_is_absent(folder: Path, bad: float) -> None:
    rows = Rows(0, np.ones((2, 2), bool), {"score": [1.0, 3.0]}, group=[0, 0], advantage=[bad, 1.0])
    step = through_disk(rows, Conventions("any", kl="none", normalisation="group mean"), folder)
    assert "advantage" in step.absent and np.allclose(step.advantage(), [[1, 1], [3, 3]])


def test_what_lies_outside_the_mask_does_not_count(folder: Path) -> None:
    """An empty response counts in its group's mean and has no advantage of its own."""
    mask = np.array([[True, False], [False, False]])
    advantage = np.array([[-1.0, np.nan], [np.nan, 99.0]])
    conventions = Conventions("any", kl="none", normalisation="group mean")
    rows = Rows(0, mask, {"score": [1.0, 3.0]}, group=[0, 0], values=None, advantage=advantage)
    step = through_disk(rows, conventions, folder)
    assert step.channels == ("score",) and step.lengths.tolist() == [1, 0]
    assert step.advantage().tolist() == [[-1.0], [0.0]]
    nothing = through_disk(
        Rows(0, np.zeros((2, 0), bool), {"score": [1.0, 3.0]}, advantage=[0.0, 0.0]), conventions, folder
    )
    assert len(nothing) == 2 and not nothing.advantage().any()


def test_names_that_parts_of_the_advantage_have() -> None:
    scores = {"kl": [1.0], "critic": [2.0], "critic_score": [3.0], "rest": [4.0]}
    record = as_record(Rows(0, np.ones((1, 1), bool), scores), Conventions("any"))
    assert record.channels == ("kl_score", "critic_score_score", "critic_score", "rest_score")
    alone = as_record(Rows(0, np.ones((1, 1), bool), {"kl": [1.0]}), Conventions("any"))
    assert alone.channels == ("score",)
    penalised = as_record(Rows(0, np.ones((1, 1), bool), {"fit": [1.0], "missing_eos": [1.0]}), Conventions("any"))
    assert penalised.channels == ("score", "missing_eos")


def test_what_was_not_scored_may_be_none() -> None:
    record = as_record(Rows(0, np.ones((2, 1), bool), {"score": [None, 2.0]}), Conventions("any"))
    assert record.rewards[:, 0, 0].tolist() == [0.0, 2.0]


def test_scores_per_token(folder: Path) -> None:
    """A process reward, to go: 1 + 2, then 2."""
    rows = Rows(0, np.array([[True, True, False]]), {"process": [[1.0, 2.0, 50.0]]}, advantage=[[3.0, 2.0, 0.0]])
    conventions = Conventions("any", kl="none", normalisation="none", score_position="token", critic=False)
    assert through_disk(rows, conventions, folder).channels == ("score",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"old_logprob": np.zeros((2, 4))}, r"old_logprob has shape \(2, 4\), expected \(2, 3\)"),
        ({"advantage": np.zeros(3)}, r"advantage has shape \(3,\)"),
        ({"scores": {"score": np.zeros((2, 1))}}, r"scores\['score'\] has shape \(2, 1\)"),
        ({"scores": {"score": ["a", "b"]}}, r"scores\['score'\] cannot be read as an array"),
        ({"response_mask": np.ones(3, bool)}, r"response_mask has shape \(3,\)"),
        ({"response_mask": np.ones((0, 3), bool)}, "at least one row"),
        ({"prompts": ["one"]}, "prompts holds 1 texts for 2 responses"),
        ({"responses": ["one", 2]}, "responses holds something that is not text"),
        ({"weights": {"other": 1.0}}, "weights names 'other'"),
        ({"weights": {"score": math.nan}}, "the weight of 'score' is nan"),
        ({"prompt_ids": np.zeros(2)}, "prompt_ids has shape"),
        ({"prompt_mask": np.ones((2, 2), bool)}, "prompt_mask has shape .* expected prompt_ids beside it"),
        ({"step": -1}, "step -1 is not a whole number"),
        ({"values": [[1.0], [2.0, 3.0]]}, "values cannot be read as an array"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], words: str) -> None:
    rows = replace(Rows(0, np.ones((2, 3), bool), {"score": np.zeros(2)}), **changes)
    with pytest.raises(InputError, match=words):
        as_record(rows, Conventions("any"))


def test_values_beside_a_baseline_of_the_group() -> None:
    rows = Rows(0, np.ones((1, 1), bool), {"score": [1.0]}, group=[0], values=[[1.0]])
    with pytest.raises(InputError, match="values of a critic"):
        as_record(rows, Conventions("any", normalisation="group mean"))


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"normalisation": "whitened"}, "'whitened' is not one of 'none', 'group mean'"),
        ({"kl": "k1"}, "Conventions.kl: 'k1' is not one of 'reward', 'loss'"),
        ({"gamma": 1.1}, "gamma: 1.1 is not between 0 and 1"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"normalisation": "leave one out", "critic": True}, "cannot both be taken off"),
        ({"normalisation": "leave one out", "lam": 0.95}, "gamma and lam must be 1"),
    ],
)
def test_conventions_that_are_none(settings_: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Conventions("any", **settings_)


# Arrays of others


class Tensor:
    """What a tensor of another library looks like from outside."""

    def __init__(self, values: np.ndarray, dtype: str = "torch.float32") -> None:
        self._values, self.dtype, self.log = values, dtype, []

    def __getattr__(self, name: str) -> Any:
        if name not in ("detach", "float", "cpu"):
            raise AttributeError(name)

        def step() -> Tensor:
            self.log.append(name)
            if name == "float":
                self.dtype = "torch.float32"
            return self

        return step

    def numpy(self) -> np.ndarray:
        assert self.dtype != "torch.bfloat16"
        return self._values


@pytest.mark.parametrize(
    ("dtype", "calls"), [("torch.float32", ["detach", "cpu"]), ("torch.bfloat16", ["detach", "float", "cpu"])]
)
def test_tensors_are_told_by_their_methods(dtype: str, calls: list[str]) -> None:
    tensor = Tensor(np.arange(3.0), dtype)
    assert to_array(tensor).tolist() == [0, 1, 2] and tensor.log == calls


def test_tensors_of_torch() -> None:
    torch = pytest.importorskip("torch")
    given = torch.tensor([[0.5, -1.25]], dtype=torch.bfloat16, requires_grad=True)
    assert to_array(given).tolist() == [[0.5, -1.25]] and to_array(given).dtype == np.float32
    rows = Rows(
        0, torch.tensor([[True, True]]), {"score": torch.tensor([1.0])}, old_logprob=given, reference_logprob=given
    )
    assert as_record(rows, Conventions("any")).old_logprob.tolist() == [[0.5, -1.25]]


def test_recording_needs_no_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; import kedge.trace.recorder; import kedge.trace.foreign"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_lists_of_unequal_length() -> None:
    assert padded([[1, 2], [], [3]]).tolist() == [[1, 2], [0, 0], [3, 0]]
    assert padded([[1, 2], [3]], left=True, fill=-1, width=3).tolist() == [[-1, 1, 2], [-1, -1, 3]]
    assert padded([[0.5], []], fill=0.0).dtype == np.float64
    mask = padded([[True, True], [True]], fill=False)
    assert mask.dtype == bool and mask.tolist() == [[True, True], [True, False]]
    assert padded([]).shape == (0, 0)
    with pytest.raises(ValueError, match="does not fit"):
        padded([[1, 2]], width=1)
