"""Controllers of beta: each follows its rule, groups have their own, and a record gives back every bit."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kedge.experiment.verify.enumerable import EOS, PAD, Space, TableModel, random_task
from kedge.experiment.verify.training import prompts_of, score_of
from kedge.ops.control import adapted_coefficient, lagrangian_coefficient, pid_coefficient
from kedge.rollout.engine import TorchEngine
from kedge.structs import Sampling
from kedge.train.checkpoint import State
from kedge.train.controller import Adaptive, Controller, Controllers, Fixed, Lagrangian, Pid
from kedge.train.policy import PolicySettings, Tie, train_policy
from kedge.train.update import Learner, UpdateSettings

PID = Pid(0.05, 6.0, proportional=0.1, integral=0.02, derivative=0.3)
KINDS: list[Controller] = [Fixed(0.05), Adaptive(0.05, 6.0, 1000.0), Lagrangian(0.05, 6.0, 0.1), PID]


def named(controller: Controller) -> str:
    return type(controller).__name__.lower()


def test_a_fixed_beta_stays() -> None:
    controller = Fixed(0.05)
    assert controller.observe(1e6, 512) is controller


@pytest.mark.parametrize("kl", [-1.0, 0.0, 3.0, 6.0, 7.5, 60.0])
def test_each_follows_its_rule_and_keeps_its_numbers(kl: float) -> None:
    adaptive, lagrangian = Adaptive(0.05, 6.0, 1000.0), Lagrangian(0.05, 6.0, 0.1)
    beta = adapted_coefficient(0.05, kl, 6.0, episodes=100, horizon=1000.0)
    assert adaptive.observe(kl, 100) == replace(adaptive, beta=beta)
    assert lagrangian.observe(kl, 100) == replace(lagrangian, beta=lagrangian_coefficient(0.05, kl, 6.0, rate=0.1))


def test_pid_carries_its_sum_and_the_kl_before() -> None:
    gains = {"proportional": 0.1, "integral": 0.02, "derivative": 0.3}
    controller, total, previous = PID, 0.05 / 0.02, 4.0
    for kl in (4.0, 7.0, 9.0, 2.0, 6.5):
        beta, total = pid_coefficient(kl, 6.0, total=total, previous=previous, **gains)
        controller, previous = controller.observe(kl, 100), kl
        assert controller == replace(PID, beta=beta, total=total, previous=kl)


def test_pid_keeps_the_first_beta_at_the_target() -> None:
    assert PID.observe(6.0, 10).beta == pytest.approx(0.05)
    without = replace(PID, integral=0.0)
    assert without.observe(6.0, 10).beta == 0, "without an integral nothing but an error makes a beta"


# Groups


def test_one_controller_serves_all_prompts() -> None:
    controllers = Controllers.of(Adaptive(0.05, 6.0, 1000.0))
    tier = torch.tensor([0, 2, 1])
    assert controllers.beta(tier).tolist() == [0.05] * 3
    kl = torch.tensor([3.0, 6.0, 12.0])
    assert controllers.observe(kl, tier).groups == (Adaptive(0.05, 6.0, 1000.0).observe(7.0, 3),)
    assert controllers.mean_beta == 0.05


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_each_group_sees_its_own_responses(kind: Controller) -> None:
    controllers = Controllers.of(kind, (0.5, 1.0, 2.0))
    kl, tier = torch.tensor([1.0, 8.0, 4.0, 10.0, 3.0]), torch.tensor([0, 2, 0, 2, 1])
    after = controllers.observe(kl, tier)
    means = [(2.5, 2), (3.0, 1), (9.0, 2)]
    assert after.groups == tuple(group.observe(*mean) for group, mean in zip(controllers.groups, means, strict=True))
    betas = [group.beta for group in after.groups]
    assert after.beta(tier).tolist() == [betas[t] for t in tier.tolist()]
    assert after.beta(tier).dtype == torch.float64
    assert after.mean_beta == pytest.approx(sum(betas) / 3)


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_a_group_without_a_response_stays_as_it_is(kind: Controller) -> None:
    controllers = Controllers.of(kind, (0.5, 1.0, 2.0))
    after = controllers.observe(torch.tensor([20.0, 20.0]), torch.tensor([1, 1]))
    assert (after.groups[0], after.groups[2]) == (controllers.groups[0], controllers.groups[2])
    assert kind == Fixed(0.05) or after.groups[1].beta > controllers.groups[1].beta


def test_a_tighter_budget_has_a_lower_target_and_a_higher_beta() -> None:
    tight, usual, loose = Controllers.of(Lagrangian(0.1, 6.0, 0.1), (0.5, 1.0, 2.0)).groups
    assert (tight, usual, loose) == (Lagrangian(0.2, 3.0, 0.1), Lagrangian(0.1, 6.0, 0.1), Lagrangian(0.05, 12.0, 0.1))
    assert Controllers.of(Fixed(0.1), (0.5, 1.0, 2.0)).groups == (Fixed(0.2), Fixed(0.1), Fixed(0.05))


def test_groups_settle_at_shares_of_the_target() -> None:
    """Three plants KL = c / beta that the same rule holds at 2, 4 and 8 nats."""
    controllers, tier = Controllers.of(Lagrangian(0.05, 4.0, 0.1), (0.5, 1.0, 2.0)), torch.arange(3)
    for _ in range(400):
        controllers = controllers.observe(0.5 / controllers.beta(tier), tier)
    assert (0.5 / controllers.beta(tier)).tolist() == pytest.approx([2.0, 4.0, 8.0], rel=1e-3)


# Records

positive = st.floats(1e-300, 1e300)


@given(
    numbers=st.tuples(positive, positive, positive, positive, positive),
    observed=st.lists(st.floats(0, 50), max_size=4),
)
def test_a_record_gives_back_every_bit(numbers: tuple[float, ...], observed: list[float]) -> None:
    a, b, c, d, e = numbers
    started = [Fixed(a), Adaptive(a, b, c), Lagrangian(a, b, c), Pid(a, b, c, d, e)]
    usual = list(KINDS)
    for kl in observed:
        usual = [one.observe(kl, 100) for one in usual]
    for controllers in (Controllers(tuple(started)), Controllers(tuple(usual)), Controllers((PID,))):
        assert Controllers.from_record(json.loads(json.dumps(controllers.record()))) == controllers


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"groups": []},
        {"groups": [{"mode": "fixed", "beta": 0.1}], "colour": 1},
        {"groups": [{"mode": "loose", "beta": 0.1}]},
        {"groups": [{"mode": "fixed", "beta": 0.1, "target": 6.0}]},
        {"groups": [{"mode": "adaptive", "beta": 0.1}]},
        {"groups": [{"beta": 0.1}]},
    ],
)
def test_a_record_of_something_else_is_refused(record: dict[str, object]) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        Controllers.from_record(record)


def test_the_dual_needs_no_more_than_its_logarithm() -> None:
    after = Lagrangian(0.05, 6.0, 0.1).observe(12.0, 1)
    assert math.log(after.beta) == pytest.approx(math.log(0.05) + 0.1)


# In the policy loop

SPACE = Space(3, 2, prompts=2)
TASK = random_task(SPACE, seed=12)


def trained(controllers: Controllers, steps: int = 120) -> tuple[list[float], Controllers]:
    """Exact KL of each prompt's answers, averaged over the second half of a run, and the controllers after it."""
    policy, reference = (TableModel(SPACE, TASK.reference) for _ in range(2))
    settings = PolicySettings(
        steps=steps,
        sampling=Sampling(SPACE.budget),
        update=UpdateSettings(epochs=2, minibatches=1, clip=0.2, max_grad_norm=1e9),
        weights={"score": 1.0, "length": 0.0, "missing_eos": 0.0},
        gamma=1.0,
        lam=1.0,
        whiten=False,
        critic_warmup=0,
        seed=0,
        eos_id=EOS,
        final_lr=0.1,
    )
    kl, state = [], State(0, controllers)
    for step in train_policy(
        Learner(policy, torch.optim.Adam(policy.parameters(), lr=0.1)),
        Tie(reference, torch.arange(SPACE.prompts)),
        {"score": score_of(TASK)},
        lambda _: prompts_of(SPACE, 256),
        TorchEngine(EOS, PAD),
        settings,
        state,
    ):
        state = step.state
        kl.append(TASK.kl(SPACE.sequence_logprobs(policy.table.detach())))
    return torch.stack(kl)[steps // 2 :].mean(dim=0).tolist(), state.controller


@pytest.mark.parametrize("kind", [Lagrangian(1.2, 0.3, 0.05), Pid(1.0, 0.3, 0.2, 0.02, 0.2)], ids=named)
def test_the_loop_settles_at_the_target(kind: Controller) -> None:
    kl, after = trained(Controllers.of(kind))
    assert sum(kl) / 2 == pytest.approx(0.3, rel=0.1)
    assert after.mean_beta < 0.8 * kind.beta


def test_the_loop_holds_each_group_at_its_share() -> None:
    kl, after = trained(Controllers.of(Lagrangian(0.4, 0.3, 0.05), (0.5, 1.5)))
    assert kl == pytest.approx([0.15, 0.45], rel=0.1)
    assert after.groups[0].beta > 1.5 * after.groups[1].beta
