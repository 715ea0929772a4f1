"""Online DPO and rejection sampling: which answers are chosen, the loss a step goes down, the trace, and going on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_learner import BUDGET, EOS, PAD, drawn, likes_fours, policy, pool, weights_of
from torch import Tensor

from kedge.errors import InputError
from kedge.rollout.engine import TorchEngine
from kedge.rollout.score import score_rollouts
from kedge.rollout.uncertainty import Uncertainty
from kedge.structs import Rollouts, Sampling, ScoredRollouts
from kedge.trace.reader import read_step
from kedge.trace.schema import describe
from kedge.trace.writer import step_table
from kedge.train import checkpoint
from kedge.train.checkpoint import State
from kedge.train.choice import best_and_worst, worths
from kedge.train.controller import Adaptive, Controllers, Fixed
from kedge.train.limit import Guard, Measured, Stop
from kedge.train.online import train_online
from kedge.train.policy import PolicySettings, Step, Tie, prompt_batch
from kedge.train.record import step_metrics, step_record
from kedge.train.rejection import train_rejection
from kedge.train.update import Learner, UpdateSettings

BETA, SMOOTHING, SAMPLES = 0.4, 0.1, 4
WEIGHTS = {"score": 1.0, "length": -0.05, "missing_eos": -0.5}
LOOPS: dict[str, Callable[..., Iterator[Step]]] = {"online_dpo": train_online, "rejection": train_rejection}
both = pytest.mark.parametrize("method", LOOPS)


def settings(**changes: Any) -> PolicySettings:
    update = UpdateSettings(epochs=1, minibatches=1, clip=0.2, max_grad_norm=1e9, microbatch=8)
    update = replace(update, **{name: changes.pop(name) for name in list(changes) if hasattr(update, name)})
    return PolicySettings(
        **{
            "steps": 1,
            "sampling": Sampling(BUDGET),
            "update": update,
            "weights": WEIGHTS,
            "gamma": 1.0,
            "lam": 1.0,
            "whiten": False,
            "critic_warmup": 0,
            "seed": 0,
            "eos_id": EOS,
            "label_smoothing": SMOOTHING,
            **changes,
        }
    )


def learner(seed: int = 0, lr: float = 1e-2) -> Learner:
    model = policy(seed)
    return Learner(model, torch.optim.Adam(model.parameters(), lr=lr, eps=1e-5))


def fresh(beta: float = BETA) -> State:
    return State(0, Controllers.of(Fixed(beta)))


def loop(
    method: str,
    of: Learner,
    numbers: PolicySettings,
    state: State | None = None,
    *,
    score: Callable[[Rollouts], Tensor] = likes_fours,
    **named: Any,
) -> Iterator[Step]:
    tie = named.pop("tie", None) or Tie(policy(seed=4))

    def draw(step: int) -> Any:
        return prompt_batch(pool(), 6, SAMPLES, 0, step)

    return LOOPS[method](of, tie, {"score": score}, draw, TorchEngine(EOS, PAD), numbers, state or fresh(), **named)


def of_group(step: Step) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(step.experience.scored.rollouts.group_id.tolist()):
        rows.setdefault(group, []).append(row)
    return rows


def worth_of(rollouts: Rollouts) -> list[float]:
    fours, length, ended = likes_fours(rollouts).tolist(), rollouts.lengths.tolist(), rollouts.ended.tolist()
    return [f - 0.05 * n - 0.5 * (not e) for f, n, e in zip(fours, length, ended, strict=True)]


# What is chosen


def test_the_best_and_the_worst_of_each_prompt() -> None:
    worth = torch.tensor([3.0, 1.0, 2.0, 5.0, 5.0, 0.0, 7.0])
    group = torch.tensor([9, 2, 9, 4, 4, 2, 1])
    assert best_and_worst(worth, group).tolist() == [[1, 5], [0, 2]], "a tie and a prompt with one answer teach nothing"


def test_of_several_best_answers_one_is_taken() -> None:
    ((best, worst),) = best_and_worst(torch.tensor([1.0, 2.0, 2.0, 1.0]), torch.zeros(4, dtype=torch.long)).tolist()
    assert best in (1, 2) and worst in (0, 3)


def test_worth_is_every_reward_but_the_divergence() -> None:
    rollouts = drawn(policy())
    rewarders = {"score": likes_fours, "rule": lambda given: given.lengths.float() ** 2}
    scored = score_rollouts(rollouts, policy(), policy(4), None, rewarders, temperature=1.0, eos_id=EOS)
    found = worths(scored, {**WEIGHTS, "rule": 0.1})
    squares = [0.1 * n**2 for n in rollouts.lengths.tolist()]
    expected = [one + other for one, other in zip(worth_of(rollouts), squares, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


# One step


def totals(scored: ScoredRollouts) -> tuple[list[float], list[float]]:
    """Log-probabilities of whole answers under policy and reference."""
    rows = scored.rollouts.response_mask
    return tuple(  # type: ignore[return-value]
        [math.fsum(row[kept].tolist()) for row, kept in zip(of.logprobs, rows, strict=True)]
        for of in (scored.old, scored.reference)
    )


def test_the_advantage_is_the_coefficient_of_the_gradient() -> None:
    (step,) = loop("online_dpo", learner(), settings())
    scored, advantage = step.experience.scored, step.experience.advantage()
    own, usual = totals(scored)
    worth = worth_of(scored.rollouts)
    expected = [0.0] * len(worth)
    for rows in of_group(step).values():
        best, worst = max(rows, key=worth.__getitem__), min(rows, key=worth.__getitem__)
        if worth[best] - worth[worst] < 1e-9:
            continue
        trained = [row for row in rows if advantage[row].abs().max() > 0]
        kept = [row for row in trained if worth[row] == worth[best]]
        assert len(trained) == 2 and len(kept) == 1, "ties among the best or the worst: either"
        (best,), (worst,) = kept, [row for row in trained if row not in kept]
        h = (own[best] - usual[best]) - (own[worst] - usual[worst])
        pull = BETA * ((1 - SMOOTHING) - 1 / (1 + math.exp(-BETA * h)))
        expected[best], expected[worst] = pull, -pull
    assert any(expected)
    for row, value in enumerate(expected):
        length = int(scored.rollouts.lengths[row])
        assert advantage[row, :length].tolist() == pytest.approx([value] * length, abs=1e-5)
        assert not advantage[row, length:].any()


def test_a_kept_answer_has_advantage_1() -> None:
    (step,) = loop("rejection", learner(), settings())
    worth, advantage = worth_of(step.experience.scored.rollouts), step.experience.advantage()
    kept = 0
    for rows in of_group(step).values():
        trained = [row for row in rows if advantage[row].any()]
        assert len(trained) == (max(worth[row] for row in rows) > min(worth[row] for row in rows))
        for row in trained:
            assert worth[row] == max(worth[other] for other in rows)
            assert advantage[row, : int(step.experience.scored.rollouts.lengths[row])].tolist() == pytest.approx(
                [1.0] * int(step.experience.scored.rollouts.lengths[row])
            )
        kept += len(trained)
    assert kept == step.figures["choice/groups"] > 0


@both
@pytest.mark.parametrize("microbatch", [256, 5, 1])
def test_the_step_is_the_gradient_with_these_coefficients(method: str, microbatch: int) -> None:
    """The first update is what the trace says: coefficient times the gradient of each token's log-probability."""
    of = learner()
    before = copy.deepcopy(of.policy)
    plain = replace(of, optimizer=torch.optim.SGD(of.policy.parameters(), lr=0.1))
    (step,) = loop(method, plain, settings(microbatch=microbatch))
    rollouts, advantage = step.experience.scored.rollouts, step.experience.advantage()
    trained = [row for row in range(len(rollouts)) if advantage[row].any()]
    share = sum(int(rollouts.lengths[row]) for row in trained) if method == "rejection" else len(trained) / 2
    objective = torch.zeros(())
    for row in trained:
        prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
        response = rollouts.response_ids[row][rollouts.response_mask[row]]
        logs = before(input_ids=torch.cat([prompt, response])[None]).logits[0].log_softmax(dim=-1)
        taken = logs[len(prompt) - 1 : -1][torch.arange(len(response)), response]
        objective = objective + (advantage[row, : len(response)] * taken).sum() / share
    objective.backward()
    for (name, weight), old in zip(of.policy.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(weight, old + 0.1 * old.grad, atol=1e-5, rtol=1e-4, msg=name)


@both
def test_where_all_answers_are_worth_the_same_nothing_is_learnt(method: str) -> None:
    of = learner()
    before = weights_of(of.policy)
    same = replace(settings(epochs=2, minibatches=2), weights=dict.fromkeys(WEIGHTS, 0.0))
    (step,) = loop(method, of, same)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(of.policy).items())
    assert step.figures["choice/groups"] == 0 and "choice/reward_kept" not in step.figures
    assert not step.experience.advantage().any() and not step.stats.active.any()
    assert all(math.isfinite(value) for value in step_metrics(step, DOUBT).values())


@both
def test_a_reward_that_is_not_a_number_is_named(method: str) -> None:
    def broken(rollouts: Rollouts) -> Tensor:
        return torch.full((len(rollouts),), float("nan"))

    with pytest.raises(InputError, match="policy step 0: channel score: the reward is nan for 24 of 24"):
        next(loop(method, learner(), settings(), score=broken))


# What a step leaves

DOUBT = Uncertainty()


@both
def test_the_trace_holds_the_step_and_derives_its_advantages(method: str, tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    (step,) = loop(method, learner(), settings(epochs=2, minibatches=2))
    record = step_record(step, DOUBT, learning=settings().update, prompts=None, responses=None)
    parquet.write_table(step_table(record), tmp_path / "step.parquet")
    read = read_step(tmp_path / "step.parquet")
    read.check_digest()
    np.testing.assert_allclose(read.advantage(), step.experience.advantage().numpy(), atol=1e-6)
    assert np.abs(read.advantage()).max() > 0
    assert read.active.any() and not read.active.all()
    parts = {str(part): np.abs(values).max() for part, values in read.parts().items()}
    assert [name for name, size in parts.items() if size > 0] == ["choice reward"]
    scored = step.experience.scored
    assert read.rewards[..., read.channels.index("score")].sum() == pytest.approx(float(scored.scores["score"].sum()))


@both
def test_every_figure_of_a_step_is_in_the_vocabulary(method: str) -> None:
    (step,) = loop(method, learner(), settings())
    found = step_metrics(step, DOUBT)
    assert [name for name in found if describe(name, "policy") is None] == []
    worth = worth_of(step.experience.scored.rollouts)
    assert found["reward/mean"] == pytest.approx(sum(worth) / len(worth), abs=1e-5)
    assert found["weight/length"] == -0.05 and found["weight/kl"] == pytest.approx(-BETA)
    best = [max(worth[row] for row in rows) for rows in of_group(step).values()]
    worst = [min(worth[row] for row in rows) for rows in of_group(step).values()]
    kept = [high for high, low in zip(best, worst, strict=True) if high > low]
    assert found["choice/reward_kept"] == pytest.approx(sum(kept) / len(kept), abs=1e-5)
    assert found["policy/first_ratio_error"] < 1e-5
    assert found["policy/ratio_max"] == pytest.approx(1, abs=1e-4), "padding has no ratio"


# Many steps


@both
def test_the_policy_learns_what_is_rewarded(method: str) -> None:
    of = learner(lr=2e-2)
    for _ in loop(method, of, settings(steps=15, minibatches=2), fresh(0.1)):
        pass
    fours = [float(likes_fours(drawn(model, 128)).mean()) for model in (policy(), of.policy)]
    assert fours[1] > 2 * fours[0]


def test_a_strong_tie_holds_the_policy() -> None:
    moved = []
    for beta in (0.05, 5.0):
        of, reference = learner(lr=2e-2), policy()
        numbers = settings(steps=15, label_smoothing=0.2)
        *_, last = loop("online_dpo", of, numbers, fresh(beta), tie=Tie(reference))
        moved.append(float(last.experience.kl_per_response().mean()))
    assert moved[0] > 3 * moved[1]


def finished(method: str, tmp_path: Path, stop: int | None) -> tuple[dict[str, Tensor], list[Step]]:
    """Train to the end, in one go or saved after `stop` steps and gone on with by a fresh learner."""
    of, numbers = learner(), settings(steps=5, epochs=2, minibatches=2, final_lr=0.3)
    state = State(0, Controllers.of(Adaptive(BETA, 0.5, 100.0)))
    steps: list[Step] = []
    for step in loop(method, of, numbers, state):
        steps.append(step)
        if step.state.step == stop:
            checkpoint.save(tmp_path / "step-000002", of, step.state, keep=1)
            break
    if stop is not None:
        of = learner(seed=1)
        steps += loop(method, of, numbers, checkpoint.load(tmp_path / "step-000002", of))
    return weights_of(of.policy), steps


@both
def test_the_rate_falls_over_the_steps(method: str) -> None:
    of = learner(lr=1e-2)
    rates = [of.optimizer.param_groups[0]["lr"] for _ in loop(method, of, settings(steps=3, final_lr=0.2))]
    assert rates == pytest.approx([1e-2, 6e-3, 2e-3])


@both
def test_going_on_from_a_checkpoint_changes_no_bit(method: str, tmp_path: Path) -> None:
    (whole, steps), (parts, resumed) = finished(method, tmp_path, None), finished(method, tmp_path, 2)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [step.figures for step in steps] == [step.figures for step in resumed]
    assert len({step.beta for step in steps}) == 5, "beta is steered"


# The limit, and text mixed in


@both
def test_at_the_limit_the_rest_of_a_step_is_left_out(method: str) -> None:
    of = learner(lr=5e-2)
    numbers = settings(epochs=4)
    (step,) = loop(method, of, numbers, tie=Tie(policy(), stop=Stop(0.05)))
    assert step.stats.left_out.flatten().tolist() == [0.0, 1.0, 1.0, 1.0]
    assert (step.stats.policy_grad_norm.flatten() > 0).tolist() == [True, False, False, False]


@both
def test_a_guard_undoes_what_went_too_far(method: str) -> None:
    of = learner()
    before = weights_of(of.policy)
    guard = Guard(0.1, "reject", lambda _, __: Measured(1.0, 0.01))
    (step,) = loop(method, of, settings(), tie=Tie(policy(4), guard=guard))
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(of.policy).items())
    assert step.verdict is not None and step.verdict.outcome == "rejected" and step.state.past.rejected == 1


@both
def test_the_reference_moves_where_it_is_told_to(method: str) -> None:
    reference = policy()
    for step in loop(method, learner(), settings(steps=3, reference_every=2), tie=Tie(reference)):
        kl = float(step.experience.kl_per_response().abs().max())
        assert (kl < 1e-5) == (step.number in (0, 2))


@both
def test_demonstrations_are_mixed_in(method: str) -> None:
    shown = drawn(policy(seed=7), 8)
    moved = []
    for weight in (0.0, 1.0):
        of = learner()
        plain = replace(of, optimizer=torch.optim.SGD(of.policy.parameters(), lr=0.1))
        numbers = settings(mix_weight=weight)
        (step,) = loop(method, plain, numbers, mix=lambda _: lambda epoch, minibatch: shown)
        moved.append(weights_of(of.policy))
    logits = policy()
    before = {name: weight.clone() for name, weight in logits.named_parameters()}
    total = torch.zeros(())
    for row in range(len(shown)):
        prompt = shown.prompt_ids[row][shown.prompt_mask[row]]
        response = shown.response_ids[row][shown.response_mask[row]]
        logs = logits(input_ids=torch.cat([prompt, response])[None]).logits[0].log_softmax(dim=-1)
        total = total - logs[len(prompt) - 1 : -1][torch.arange(len(response)), response].sum()
    loss = total / float(shown.lengths.sum())
    loss.backward()
    assert float(step.stats.mix_loss) == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, weight in logits.named_parameters():
        torch.testing.assert_close(moved[1][name] - moved[0][name], -0.1 * weight.grad, atol=1e-5, rtol=1e-3, msg=name)
        assert torch.equal(weight, before[name])
