"""DPO and IPO on judged pairs: the loss a step goes down, what the pairs are, the optimum reached, and going on."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_learner import EOS, PAD, VOCABULARY, drawn, likes_fours, policy, weights_of
from torch import Tensor

from kedge.errors import DivergenceError, InputError
from kedge.experiment.verify.enumerable import Space, TableModel, Task, random_task
from kedge.rollout.given import as_rollouts
from kedge.structs import Judgments, Rollouts
from kedge.train import checkpoint
from kedge.train.checkpoint import State
from kedge.train.controller import Controllers, Fixed
from kedge.train.direct import (
    DirectSettings,
    DirectStep,
    batch_of,
    examine_pairs,
    preference_pairs,
    sequence_logprobs,
    train_direct,
)
from kedge.train.update import Learner, UpdateSettings

UPDATE = UpdateSettings(epochs=1, minibatches=2, clip=0.2, microbatch=8)
SETTINGS = DirectSettings("dpo", 6, 8, UPDATE, beta=0.5, label_smoothing=0.1, seed=0, eos_id=EOS)
FRESH = State(0, Controllers.of(Fixed(0.5)))


def learner(lr: float = 1e-2, seed: int = 0) -> Learner:
    model = policy(seed)
    return Learner(model, torch.optim.Adam(model.parameters(), lr=lr, eps=1e-5))


def pairs_of(responses: Rollouts, better: Tensor, worse: Tensor) -> Judgments:
    count = len(better)
    grades = torch.tensor([1.0, 0.0]).expand(count, 2)
    return Judgments(responses, torch.stack([better, worse], dim=1), grades, torch.zeros(count))


def judged(count: int = 24) -> Judgments:
    """Pairs in which the response with more fours is the better one."""
    prompts = [[2, 3 + number % 4] for number in range(count) for _ in range(2)]
    generator = torch.Generator().manual_seed(5)
    responses = [
        [*torch.randint(3, VOCABULARY, (int(torch.randint(1, 8, (1,), generator=generator)),), generator=generator)
         .tolist(), EOS]
        for _ in prompts
    ]  # fmt: skip
    for number in range(count):
        responses[2 * number] = [4, *responses[2 * number]]
    rollouts = as_rollouts(prompts, responses, PAD)
    return pairs_of(rollouts, torch.arange(0, 2 * count, 2), torch.arange(1, 2 * count, 2))


def plain_logprobs(model: Any, rollouts: Rollouts) -> list[Tensor]:
    """Log-probability of each response, one row at a time and without padding."""
    found = []
    for row in range(len(rollouts)):
        prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
        response = rollouts.response_ids[row][rollouts.response_mask[row]]
        logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0]
        logs = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1]
        found.append(logs[torch.arange(len(response)), response].sum())
    return found


# Pairs


def test_pairs_of_a_ranking_are_its_decided_ones() -> None:
    responses = as_rollouts([[2]] * 6, [[3, EOS]] * 6, PAD)
    index = torch.tensor([[0, 1, 2], [3, 4, -1]])
    grades = torch.tensor([[0.0, -1.0, -1.0], [2.0, 2.0, 0.0]])  # the second and third are tied, so are the last two
    found = preference_pairs(Judgments(responses, index, grades, torch.zeros(2)))
    assert found.tolist() == [[0, 1], [0, 2]]


def test_a_vote_against_the_first_is_a_pair_the_other_way_round() -> None:
    given = judged(3)
    grades = torch.tensor([[1.0, 0.0], [0.4, 0.6], [0.5, 0.5]])
    assert preference_pairs(replace(given, grades=grades)).tolist() == [[0, 1], [3, 2]]


def test_judgments_of_single_responses_are_refused() -> None:
    responses = as_rollouts([[2]] * 3, [[3, EOS]] * 3, PAD)
    ratings = Judgments(responses, torch.arange(3).unsqueeze(1), torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(3))
    with pytest.raises(InputError, match=r"policy.method: no judgment says which of two .* give pairs or rankings"):
        next(train_direct(learner(), policy(), ratings, SETTINGS, FRESH))


def test_held_out_pairs_that_are_all_ties_have_no_figures() -> None:
    given = judged(2)
    ties = replace(given, grades=torch.full((2, 2), 0.5))
    assert examine_pairs(policy(), policy(), ties, SETTINGS) == {}
    assert examine_pairs(policy(), policy(), given, SETTINGS)


def test_every_pair_comes_once_a_pass_and_a_step_depends_on_nothing_before_it() -> None:
    steps = [batch_of(20, 6, 0, step).tolist() for step in range(10)]
    flat = [row for step in steps for row in step]
    for start in (0, 20, 40):
        assert sorted(flat[start : start + 20]) == list(range(20))
    assert flat[:20] != flat[20:40]
    assert batch_of(20, 6, 0, 7).tolist() == steps[7] != batch_of(20, 6, 1, 7).tolist()
    assert sorted(batch_of(4, 8, 0, 0).tolist()) == [0, 0, 1, 1, 2, 2, 3, 3], "more a step than there are"


# A step


@pytest.mark.parametrize("method", ["dpo", "ipo"])
@pytest.mark.parametrize("microbatch", [256, 6, 1])
def test_a_step_goes_down_the_loss_written_out(method: str, microbatch: int) -> None:
    """One plain gradient step on all pairs, against a sum over single responses in the other order of operations."""
    given, reference = judged(6), policy(seed=4)
    settings = replace(
        SETTINGS,
        method=method,
        pairs_per_step=6,
        update=replace(UPDATE, minibatches=1, max_grad_norm=1e9, microbatch=microbatch),
    )
    of = learner()
    expected = copy.deepcopy(of.policy)
    own, usual = plain_logprobs(expected, given.responses), plain_logprobs(reference, given.responses)
    total = torch.zeros(())
    for pair in range(6):
        h = (own[2 * pair] - usual[2 * pair].detach()) - (own[2 * pair + 1] - usual[2 * pair + 1].detach())
        if method == "ipo":
            total = total + (h - 1 / (2 * 0.5)) ** 2 / 6
        else:
            won = torch.sigmoid(0.5 * h)
            total = total - (0.9 * won.log() + 0.1 * (1 - won).log()) / 6
    total.backward()
    plain = replace(of, optimizer=torch.optim.SGD(of.policy.parameters(), lr=0.1))
    (step,) = train_direct(plain, reference, given, replace(settings, steps=1), FRESH)
    assert step.figures["direct/loss"] == pytest.approx(float(total.detach()), rel=1e-4)
    for (name, weight), wanted in zip(of.policy.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, wanted - 0.1 * wanted.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_figures_are_those_of_the_pairs() -> None:
    given, reference = judged(8), policy(seed=4)
    of = learner()
    own, usual = plain_logprobs(of.policy, given.responses), plain_logprobs(reference, given.responses)
    ratio = [float((one - other).detach()) for one, other in zip(own, usual, strict=True)]
    chosen, rejected = ratio[0::2], ratio[1::2]
    settings = replace(SETTINGS, steps=1, update=replace(UPDATE, minibatches=1))
    examined = examine_pairs(of.policy, reference, given, settings)
    (step,) = train_direct(of, reference, given, settings, FRESH)
    for found in (examined, step.figures):
        assert found["direct/chosen"] == pytest.approx(sum(chosen) / 8, abs=1e-4)
        assert found["direct/rejected"] == pytest.approx(sum(rejected) / 8, abs=1e-4)
        assert found["direct/margin"] == pytest.approx((sum(chosen) - sum(rejected)) / 8, abs=1e-4)
        right = sum(one > other for one, other in zip(chosen, rejected, strict=True))
        assert found["direct/accuracy"] == pytest.approx(right / 8)
    assert step.beta == step.figures["kl/beta"] == 0.5
    assert step.figures["policy/grad_norm"] > 0


def test_from_the_reference_every_pair_is_undecided() -> None:
    (step,) = train_direct(learner(), policy(), judged(), replace(SETTINGS, steps=1, pairs_per_step=24,
                           update=replace(UPDATE, minibatches=1)), FRESH)  # fmt: skip
    assert step.figures["direct/accuracy"] == pytest.approx(0.5, abs=0.3)  # rounding decides
    assert step.figures["direct/margin"] == pytest.approx(0, abs=1e-5)
    assert step.figures["direct/loss"] == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize(("method", "beta"), [("dpo", 0.5), ("ipo", 0.1)])
def test_the_policy_learns_which_is_better(method: str, beta: float) -> None:
    of, reference = learner(), policy()
    settings = replace(SETTINGS, method=method, beta=beta, steps=15, pairs_per_step=24)
    steps = list(train_direct(of, reference, judged(), settings, FRESH))
    assert steps[-1].figures["direct/accuracy"] > 0.95
    assert steps[-1].figures["direct/loss"] < steps[0].figures["direct/loss"]
    fours = [float(likes_fours(drawn(model, 128)).mean()) for model in (reference, of.policy)]
    assert fours[1] > 1.3 * fours[0]


def test_rates_fall_as_on_policy() -> None:
    of = learner(lr=1e-2)
    rates = []
    for _ in train_direct(of, policy(), judged(), replace(SETTINGS, steps=5, final_lr=0.2), FRESH):
        rates.append(of.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-2, 8e-3, 6e-3, 4e-3, 2e-3])


def test_what_is_not_finite_is_named_and_left_out() -> None:
    of, broken = learner(), policy()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    before = weights_of(of.policy)
    with pytest.raises(DivergenceError, match=r"policy step 0: the update is not finite: loss nan.*lower policy.lr"):
        next(train_direct(of, broken, judged(), SETTINGS, FRESH))
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(of.policy).items())


# The optimum, and going on


def population(task: Task, seed: int, count: int) -> Judgments:
    """Pairs of the reference's sequences, labelled by Bradley–Terry of the task's reward."""
    space, generator = task.space, torch.Generator().manual_seed(seed)
    number = torch.randint(space.prompts, (count,), generator=generator)
    law = task.reference_logprobs.exp()[number]
    one, other = (torch.multinomial(law, 1, generator=generator).squeeze(1) for _ in range(2))
    gap = task.reward[number, one] - task.reward[number, other]
    first = torch.rand(count, generator=generator) < torch.sigmoid(gap)
    rows = torch.stack([torch.where(first, one, other), torch.where(first, other, one)], dim=1).flatten()
    prompt = number.repeat_interleave(2)
    ids, mask = space.prompt_ids(prompt)
    responses = Rollouts(
        prompt_ids=ids,
        prompt_mask=mask,
        response_ids=space.response_ids(rows),
        response_mask=space.mask[rows],
        ended=space.ended[rows],
        group_id=prompt,
        behaviour_logprobs=torch.zeros(2 * count, space.budget, dtype=torch.float64),
    )
    return pairs_of(responses, torch.arange(0, 2 * count, 2), torch.arange(1, 2 * count, 2))


def test_dpo_on_many_pairs_comes_to_the_optimum_of_the_reward() -> None:
    task = random_task(Space(letters=2, budget=2, prompts=2), seed=3, beta=0.5, spread=1.0)
    model, reference = TableModel(task.space, task.reference), TableModel(task.space, task.reference)
    of = Learner(model, torch.optim.Adam(model.parameters(), lr=0.1))
    update = UpdateSettings(epochs=1, minibatches=1, clip=0.2, max_grad_norm=1e9, microbatch=4096)
    settings = DirectSettings("dpo", 60, 1500, update, task.beta, 0.0, 0, 2, final_lr=0.05)
    assert task.distance(model.table) > 0.2
    for _ in train_direct(of, reference, population(task, 0, 20_000), settings, FRESH):
        pass
    assert task.distance(model.table) < 0.06


def finished(tmp_path: Path, stop: int | None) -> tuple[dict[str, Tensor], list[DirectStep]]:
    """Train to the end, in one go or saved after `stop` steps and gone on with by a fresh learner."""
    of, reference, given = learner(seed=0), policy(), judged()
    settings = replace(SETTINGS, update=replace(UPDATE, epochs=2))
    steps: list[DirectStep] = []
    for step in train_direct(of, reference, given, settings, FRESH):
        steps.append(step)
        if step.state.step == stop:
            checkpoint.save(tmp_path / "step-000003", of, step.state, keep=1)
            break
    if stop is not None:
        of = learner(seed=1)
        state = checkpoint.load(tmp_path / "step-000003", of)
        assert state.step == stop
        steps += train_direct(of, reference, given, settings, state)
    return weights_of(of.policy), steps


def test_going_on_from_a_checkpoint_changes_no_bit(tmp_path: Path) -> None:
    (whole, steps), (parts, resumed) = finished(tmp_path, None), finished(tmp_path, 3)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [step.figures for step in steps] == [step.figures for step in resumed]


def test_log_probabilities_are_sums_over_the_whole_response() -> None:
    given, model = judged(4), policy()
    found = sequence_logprobs(model, given.responses, SETTINGS)
    assert found.tolist() == pytest.approx(
        [float(x.detach()) for x in plain_logprobs(model, given.responses)], abs=1e-4
    )
