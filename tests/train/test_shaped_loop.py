"""The policy loop with everything of this kind at once: penalties, a running or relative score, a pretraining mix."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_learner import BUDGET, EOS, PAD, WEIGHTS, learner, likes_fours, policy, pool, weights_of
from torch import Tensor

from kedge.models.heads import Critic
from kedge.rollout.engine import TorchEngine
from kedge.rollout.score import Rewarder
from kedge.rollout.shaping import SHAPING, ReferenceAnswers, above_reference, shaping_rewarders
from kedge.structs import Rollouts, Sampling
from kedge.train import checkpoint
from kedge.train.checkpoint import State
from kedge.train.controller import Controllers, Fixed
from kedge.train.experience import channel_names
from kedge.train.mix import Mix
from kedge.train.normalise import RunningScore
from kedge.train.policy import PolicySettings, Step, Tie, prompt_batch, train_policy
from kedge.train.schedule import seeded
from kedge.train.sft import heldout_loss
from kedge.train.update import Learner, UpdateSettings

SAMPLING = Sampling(BUDGET)
STEPS = 4


def demonstrations() -> Rollouts:
    return TorchEngine(EOS, PAD).generate(policy(5), pool(20), SAMPLING, seeded(0, "demonstrations"))


def with_critic(of: Learner, heads: tuple[str, ...]) -> Learner:
    critic = Critic(of.critic.trunk, 16, heads)  # type: ignore[union-attr]
    return Learner(of.policy, of.optimizer, critic, torch.optim.Adam(critic.parameters(), lr=1e-3, eps=1e-5))


class Loop:
    """A run of the production loop; every part is made anew, as a process that goes on would."""

    def __init__(self, score: str, mix_weight: float = 0.5) -> None:
        self.raw: list[Tensor] = []
        engine, reference = TorchEngine(EOS, PAD), policy(seed=9)
        answers = ReferenceAnswers(engine, reference, SAMPLING, partial(seeded, 0, "reference answer"))
        plain: Rewarder = self.scored if score == "running" else above_reference(likes_fours, answers)
        shaped = shaping_rewarders(overlong=1.0, target=0.1, repetition=0.5, budget=BUDGET, buffer=3, answers=answers)
        self.rewarders = {"score": plain, **shaped}
        self.learner = with_critic(learner(), channel_names(tuple(self.rewarders)))
        self.begin = State(0, Controllers.of(Fixed(0.1)), score=RunningScore() if score == "running" else None)
        update = UpdateSettings(epochs=2, minibatches=2, clip=0.2, mix_weight=mix_weight, budget=BUDGET)
        weights = WEIGHTS | {"overlong": -1.0, "over_target": -0.1, "repetition": -0.5}
        self.settings = PolicySettings(STEPS, SAMPLING, update, weights, 1.0, 0.95, True, 0, seed=3, eos_id=EOS)
        self.reference, self.engine = reference, engine
        self.mix = Mix(demonstrations(), 6, 2, 2, seed=3).at if mix_weight else None

    def scored(self, rollouts: Rollouts) -> Tensor:
        self.raw.append(likes_fours(rollouts))
        return self.raw[-1]

    def run(self, state: State, steps: int) -> list[Step]:
        every = train_policy(
            self.learner,
            Tie(self.reference),
            self.rewarders,
            lambda step: prompt_batch(pool(), 8, 2, 3, step),
            self.engine,
            self.settings,
            state,
            mix=self.mix,
        )
        return list(itertools.islice(every, steps))


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(value, weights_of(other)[name]) for name, value in weights_of(one).items())


@pytest.mark.parametrize("score", ["running", "prompt"])
def test_stopped_and_resumed_is_the_same_bit_for_bit(score: str, tmp_path: Path) -> None:
    whole = Loop(score)
    last = whole.run(whole.begin, STEPS)[-1]
    first = Loop(score)
    stopped = first.run(first.begin, 2)[-1]
    checkpoint.save(tmp_path / "step-000002", first.learner, stopped.state, keep=1)
    resumed = Loop(score)
    state = checkpoint.load(tmp_path / "step-000002", resumed.learner)
    assert state.score == stopped.state.score
    again = resumed.run(state, STEPS - 2)[-1]
    assert again.number == last.number and again.state.score == last.state.score
    assert same(resumed.learner.policy, whole.learner.policy)
    assert same(resumed.learner.critic, whole.learner.critic)


def test_the_running_unit_is_that_of_all_scores_so_far() -> None:
    loop = Loop("running")
    for number, step in enumerate(loop.run(loop.begin, 3)):
        everything = torch.cat(loop.raw[: number + 1]).double()
        used = step.experience.channel("score")
        expected = (loop.raw[number] - everything.mean()) / (everything.var(correction=0) + 1e-8).sqrt()
        torch.testing.assert_close(used, expected.to(used.dtype), atol=1e-6, rtol=1e-5)


def test_the_penalties_are_channels_with_their_weight() -> None:
    loop = Loop("prompt")
    (step,) = loop.run(loop.begin, 1)
    experience = step.experience
    rollouts = experience.scored.rollouts
    for name, weight in zip(SHAPING, (-1.0, -0.1, -0.5), strict=True):
        column = experience.channels.index(name)
        assert experience.weights[:, column].unique().tolist() == [pytest.approx(weight)]
        at_end = experience.rewards[torch.arange(len(rollouts)), rollouts.last, column]
        torch.testing.assert_close(at_end, experience.channel(name), msg="on the last token")
    assert experience.channel("over_target").max() > 0


def test_demonstrations_in_the_mix_become_likelier_than_without() -> None:
    losses = {}
    for weight in (0.0, 2.0):
        loop = Loop("prompt", weight)
        steps = loop.run(loop.begin, STEPS)
        given = demonstrations()
        batch = Mix(given, len(given), 1, 1, 0).batch(0, 0, 0)
        losses[weight] = heldout_loss(loop.learner.policy, batch)[0]
        assert (float(steps[0].stats.mix_loss.mean()) > 0) == bool(weight)
    assert losses[2.0] < losses[0.0]
