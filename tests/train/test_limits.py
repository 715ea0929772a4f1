"""The hard limit on the KL: what each action measures, undoes and remembers, and that the limit holds exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny_learner as tiny
import torch
from torch import Tensor

from kedge.errors import InputError
from kedge.experiment.verify.enumerable import EOS, PAD, Space, TableModel, Task, random_table
from kedge.experiment.verify.training import prompts_of, score_of
from kedge.rollout.engine import TorchEngine
from kedge.rollout.score import token_scores
from kedge.structs import Prompts, Rollouts, Sampling
from kedge.train import checkpoint
from kedge.train.checkpoint import State
from kedge.train.controller import Adaptive, Controllers, Fixed, Lagrangian, Pid
from kedge.train.limit import CAUTION, Guard, Measured, Past, Stop, exact_check, expected_kl, sequence_kl
from kedge.train.policy import PolicySettings, Step, Tie, prompt_batch, train_policy
from kedge.train.schedule import seeded
from kedge.train.snapshot import restore, snapshot
from kedge.train.update import Learner, UpdateSettings

SPACE = Space(3, 3, prompts=2)
REFERENCE = random_table(SPACE, seed=5)
LIMIT = 0.4
Action = Literal["stop", "reject", "rollback"]


def table_model(table: Tensor = REFERENCE) -> TableModel:
    return TableModel(SPACE, table)


def exact_kl(table: Tensor) -> float:
    """KL(policy || reference) in nats per sequence, summed over every response of every prompt."""
    own, usual = (SPACE.sequence_logprobs(each.detach()) for each in (table, REFERENCE))
    return float((own.exp() * (own - usual)).sum(dim=-1).mean())


def responses(policy: TableModel, count: int, seed: int = 0) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    return TorchEngine(EOS, PAD).generate(policy, prompts_of(SPACE, count), Sampling(SPACE.budget), generator)


# Measuring


def test_the_check_is_unbiased_and_varies_less_than_k1() -> None:
    policy, reference = table_model(REFERENCE + random_table(SPACE, seed=6)), table_model()
    rollouts = responses(policy, 40_000)
    exact = exact_kl(policy.table)
    each = expected_kl(policy, reference, rollouts, temperature=1.0)
    own = token_scores(policy, rollouts, temperature=1.0, eos_id=EOS)
    plain = sequence_kl(reference, rollouts, own.logprobs, temperature=1.0, eos_id=EOS)
    for sample in (each, plain):
        error = float(sample.std()) / math.sqrt(len(sample))
        assert abs(float(sample.mean()) - exact) < 4 * error
    assert float(each.min()) > 0 > float(plain.min())
    assert float(each.var()) < float(plain.var()) / 2


def test_k1_of_a_sequence_is_a_sum_over_its_own_tokens() -> None:
    policy, other = table_model(REFERENCE + random_table(SPACE, seed=6)), table_model()
    rollouts = responses(policy, 50)
    own = token_scores(policy, rollouts, temperature=1.0, eos_id=EOS)
    found = sequence_kl(other, rollouts, own.logprobs, temperature=1.0, eos_id=EOS)
    index = SPACE.index_of(rollouts.response_ids, rollouts.response_mask)
    logprobs = [SPACE.sequence_logprobs(model.table.detach())[rollouts.group_id, index] for model in (policy, other)]
    torch.testing.assert_close(found, logprobs[0] - logprobs[1])


def test_the_check_has_its_own_draws_a_standard_error_and_no_nucleus() -> None:
    policy, reference = table_model(REFERENCE + random_table(SPACE, seed=6)), table_model()
    engine, sampling = TorchEngine(EOS, PAD), Sampling(SPACE.budget)
    check = exact_check(reference, lambda _: prompts_of(SPACE, 64), engine, sampling, seed=3)
    nucleus = exact_check(reference, lambda _: prompts_of(SPACE, 64), engine, replace(sampling, top_p=0.5), seed=3)
    assert check(policy, 4) == check(policy, 4) == nucleus(policy, 4)
    assert check(policy, 4) != check(policy, 5)
    rollouts = engine.generate(policy, prompts_of(SPACE, 64), sampling, seeded(3, "kl check", 4))
    each = expected_kl(policy, reference, rollouts, temperature=1.0).tolist()
    mean = sum(each) / 64
    assert check(policy, 4).kl == pytest.approx(mean)
    assert check(policy, 4).error == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in each) / 63 / 64))
    found = [check(policy, step) for step in range(200)]
    z = torch.tensor([(one.kl - exact_kl(policy.table)) / one.error for one in found])
    assert float(z.std()) == pytest.approx(1, abs=0.25), "errors are as large as they say"
    assert abs(float(z.mean())) < 0.25


def test_a_stop_looks_at_the_policy_as_it_is_now() -> None:
    old, usual = torch.full((2, 3), -1.0), torch.full((2, 3), -1.2)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    edge = 0.5 + CAUTION * 0.1  # 0.6 and 0.4 nats
    assert not Stop(edge + 0.01)(old, old, usual, mask) and Stop(edge - 0.01)(old, old, usual, mask)
    assert Stop(edge + 0.01)(old + 0.1, old, usual, mask)
    assert Stop(1e9)(old * math.nan, old, usual, mask), "what is not a number is past every limit"


# Undoing


class Script:
    """A check that says what it is told."""

    def __init__(self, *found: tuple[float, float]) -> None:
        self.found = [Measured(*each) for each in found]

    def __call__(self, policy: Any, step: int) -> Measured:
        return self.found[step]


def small() -> Learner:
    model = torch.nn.Linear(2, 2)
    return Learner(model, torch.optim.Adam(model.parameters(), lr=0.1))


def stepped(of: Learner) -> None:
    of.policy(torch.ones(2)).sum().backward()
    of.optimizer.step()
    of.optimizer.zero_grad()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def walk(guard: Guard, of: Learner, steps: int, past: Past = Past()) -> Iterator[tuple[str, dict[str, Tensor], Past]]:  # noqa: B008
    for step in range(steps):
        guard.before(of, past)
        stepped(of)
        verdict = guard.after(of, step)
        past = verdict.past
        yield verdict.outcome, snapshot(of), past


def test_a_snapshot_is_apart_from_the_learner() -> None:
    of = small()
    fresh = snapshot(of)
    stepped(of)
    kept = snapshot(of)
    assert len(fresh) == 2 and len(kept) == 2 + 2 * 3, "weights; step and two moments of each"
    for _ in range(2):
        stepped(of)
        assert not same(snapshot(of), kept)
        restore(of, kept)
        assert same(snapshot(of), kept), "also the second time"
    restore(of, fresh)
    assert same(snapshot(of), fresh), "moments that were not there are gone"


def test_frozen_weights_are_not_part_of_it() -> None:
    of = small()
    of.policy.bias.requires_grad_(False)
    assert list(snapshot(of)) == ["policy/weight"]


def test_a_rejected_update_leaves_no_trace() -> None:
    of = small()
    guard = Guard(1.0, "reject", Script((0.5, 0.1), (0.85, 0.1), (1.1, 0.0), (math.nan, 0.0), (0.9, 0.0)))
    start = snapshot(of)
    found = list(walk(guard, of, 5))
    assert [outcome for outcome, _, _ in found] == ["kept", "rejected", "rejected", "rejected", "kept"]
    assert [past.rejected for _, _, past in found] == [0, 1, 2, 3, 3]
    assert not same(start, found[0][1]) and same(found[0][1], found[3][1])
    other = small()
    restore(other, start)
    stepped(other), stepped(other)
    assert same(snapshot(other), found[4][1]), "two updates were kept, moments included"


def test_two_standard_errors_must_fit_below_the_limit() -> None:
    assert CAUTION == 2
    guard = Guard(1.0, "reject", Script((0.8, 0.1), (0.8, 0.11)))
    assert [outcome for outcome, _, _ in walk(guard, small(), 2)] == ["kept", "rejected"]


def test_a_rollback_goes_to_the_last_state_held_inside() -> None:
    of = small()
    inside, past_it = (0.5, 0.0), (2.0, 0.0)
    guard = Guard(1.0, "rollback", Script(past_it, inside, inside, past_it, inside, past_it), every=2)
    start = snapshot(of)
    found = list(walk(guard, of, 6))
    assert [outcome == "rolled back" for outcome, _, _ in found] == [True, False, False, True, False, True]
    assert [past.branch for _, _, past in found] == [1, 1, 1, 2, 2, 3]
    assert [past.held_step for _, _, past in found] == [0, 2, 2, 2, 2, 2]
    assert [past.rejected for _, _, past in found] == [0] * 6
    assert same(found[0][1], start), "nothing was held but the beginning"
    assert same(found[3][1], found[1][1]) and same(found[5][1], found[1][1])
    assert not same(found[2][1], found[1][1]) and not same(found[4][1], found[1][1])


def test_what_another_reference_held_is_released() -> None:
    past = Past(rejected=2, branch=3, held_step=4, held={"policy/weight": torch.zeros(1)})
    assert past.released() == Past(2, 3) and not past.released().held


def test_the_verdict_says_what_happened() -> None:
    guard = Guard(4.0, "rollback", Script((4.31, 0.12)))
    of = small()
    guard.before(of, Past())
    verdict = guard.after(of, 0)
    assert verdict.sentence == (
        "KL 4.31 ± 0.12 nats per response against a limit of 4: back to the policy before step 0, branch 1"
    )
    assert verdict.figures() == {"kl/check": 4.31, "kl/check_error": 0.12, "kl/rejected": 0, "kl/branch": 1}
    rejecting = Guard(4.0, "reject", Script((4.31, 0.12)))
    rejecting.before(of, Past(rejected=6))
    assert rejecting.after(of, 0).sentence.endswith("a limit of 4: the update is undone (7 so far)")


def test_a_start_past_the_limit_is_refused() -> None:
    Guard(4.0, "reject", Script((3.0, 0.5))).require_inside(None)
    with pytest.raises(InputError, match=r"policy.kl.limit = 4: the policy begins 3 ± 0.6 nats .* -> raise the limit"):
        Guard(4.0, "reject", Script((3.0, 0.6))).require_inside(None)


# Holding


def pulled(action: Action | None, seed: int, steps: int = 40) -> tuple[list[float], list[Step]]:
    """KL after every step, exact, of a policy that a reward without any penalty pulls far from its reference."""
    task = Task(SPACE, REFERENCE, 2 * torch.eye(len(SPACE.sequences), dtype=torch.float64)[[7, 30]], beta=1.0)
    policy, reference, engine = table_model(), table_model(), TorchEngine(EOS, PAD)
    sampling = Sampling(SPACE.budget)
    check = exact_check(reference, lambda _: prompts_of(SPACE, 256), engine, sampling, seed)
    guard = None if action in (None, "stop") else Guard(LIMIT, action, check, every=5)  # type: ignore[arg-type]
    settings = PolicySettings(
        steps=steps,
        sampling=sampling,
        update=UpdateSettings(epochs=2, minibatches=2, clip=0.2, max_grad_norm=1e9),
        weights={"score": 1.0, "length": 0.0, "missing_eos": 0.0},
        gamma=1.0,
        lam=1.0,
        whiten=True,
        critic_warmup=0,
        seed=seed,
        eos_id=EOS,
    )
    kl, taken = [], []
    for step in train_policy(
        Learner(policy, torch.optim.Adam(policy.parameters(), lr=0.05)),
        Tie(reference, guard=guard, stop=Stop(LIMIT) if action == "stop" else None),
        {"score": score_of(task)},
        lambda _: prompts_of(SPACE, 256),
        engine,
        settings,
        State(0, Controllers.of(Fixed(0.0))),
    ):
        kl.append(exact_kl(policy.table))
        taken.append(step)
    return kl, taken


def test_without_a_limit_the_policy_goes_far() -> None:
    assert pulled(None, seed=0)[0][-1] > 2 * LIMIT


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("action", ["reject", "rollback"])
def test_the_limit_holds(action: Action, seed: int) -> None:
    kl, steps = pulled(action, seed)
    verdicts = [step.verdict for step in steps if step.verdict is not None]
    assert len(verdicts) == len(steps)
    worst = max(each.error for each in verdicts)
    assert worst < 0.1 * LIMIT
    assert max(kl) <= LIMIT + worst, "3 standard errors above what may be kept"
    past = steps[-1].state.past
    count = past.rejected if action == "reject" else past.branch
    assert count == sum(each.outcome != "kept" for each in verdicts) > 3
    assert kl[-1] > 0.3 * LIMIT, "it does move"


@pytest.mark.parametrize("seed", range(3))
def test_a_stop_takes_the_step_over_the_limit_back(seed: int) -> None:
    kl, steps = pulled("stop", seed)
    assert max(kl) < LIMIT
    assert kl[-1] > 0.5 * LIMIT, "it uses the room"
    assert sum(int(step.stats.left_out.sum()) for step in steps) > 20


# Going on

CONTROLLERS = {
    "fixed": Controllers.of(Fixed(0.02)),
    "adaptive": Controllers.of(Adaptive(0.02, 0.3, 300.0), (0.5, 1.0, 2.0)),
    "lagrangian": Controllers.of(Lagrangian(0.02, 0.3, 0.1)),
    "pid": Controllers.of(Pid(0.02, 0.3, 0.1, 0.02, 0.05), (0.5, 1.0, 2.0)),
}


class Run:
    """A tiny Llama that learns to say fours, held at a limit it soon meets."""

    def __init__(self, controllers: Controllers, action: Action | None) -> None:
        self.learner = tiny.learner(lr=5e-3)
        self.state = State(0, controllers)
        pool, engine, sampling, reference = tiny.pool(), TorchEngine(tiny.EOS, tiny.PAD), Sampling(8), tiny.policy()

        def draw(step: int) -> Prompts:
            return prompt_batch(pool, 16, 1, 0, step)

        guard = None
        if action in ("reject", "rollback"):
            check = exact_check(reference, draw, engine, sampling, 0)
            guard = Guard(0.7, action, check, every=2)
        self.tie = Tie(
            reference,
            tiers=torch.arange(len(pool)) % 3,
            guard=guard,
            stop=Stop(0.7) if action == "stop" else None,
        )
        self.draw, self.engine, self.sampling = draw, engine, sampling

    def to(self, step: int) -> list[Step]:
        settings = PolicySettings(
            steps=step,
            sampling=self.sampling,
            update=UpdateSettings(epochs=2, minibatches=2, clip=0.2),
            weights={"score": 1.0, "length": 0.0, "missing_eos": 0.0},
            gamma=1.0,
            lam=0.95,
            whiten=True,
            critic_warmup=0,
            seed=0,
            eos_id=tiny.EOS,
        )
        rewarders = {"score": tiny.likes_fours}
        loop = train_policy(self.learner, self.tie, rewarders, self.draw, self.engine, settings, self.state)
        steps = list(loop)
        self.state = steps[-1].state
        return steps


CASES = [*((mode, None) for mode in CONTROLLERS), ("pid", "stop"), ("pid", "reject"), ("adaptive", "rollback")]


@pytest.mark.parametrize(("mode", "action"), CASES)
def test_going_on_is_bit_for_bit(mode: str, action: Action | None, tmp_path: Path) -> None:
    whole, first, second = (Run(CONTROLLERS[mode], action) for _ in range(3))
    steps = whole.to(9)
    first.to(5)
    folder = tmp_path / "step-000005"
    checkpoint.save(folder, first.learner, first.state, keep=1)
    second.state = checkpoint.load(folder, second.learner)
    assert second.state == replace(first.state, return_variance=second.state.return_variance)
    assert same(dict(second.state.past.held), dict(first.state.past.held))
    later = second.to(9)
    assert same(snapshot(second.learner), snapshot(whole.learner))
    assert second.state.controller == whole.state.controller and second.state.past == whole.state.past
    assert [step.beta for step in later] == [step.beta for step in steps[5:]]
    verdicts = [replace(step.verdict, past=Past()) if step.verdict else None for step in steps]
    assert [replace(step.verdict, past=Past()) if step.verdict else None for step in later] == verdicts[5:]
    if action in ("reject", "rollback"):
        outcomes = [verdict.outcome for verdict in verdicts if verdict is not None]
        assert "kept" in outcomes and {*outcomes[:5]} & {*outcomes[5:]} & {"rejected", "rolled back"}
    if action == "stop":
        assert sum(int(step.stats.left_out.sum()) for step in later) > 0
    if mode != "fixed":
        assert len({step.beta for step in steps}) > 5
