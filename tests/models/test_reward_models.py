"""Reward models of several members: their scores, their folders, and that plain transformers reads these."""

from __future__ import annotations

import copy
import json
import math
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kedge.data.tokenise import train_tokenizer
from kedge.errors import DivergenceError, InputError
from kedge.models.correction import LengthCorrection
from kedge.models.heads import Critic
from kedge.models.load import save_model, scratch_policy
from kedge.models.reward import RewardModel, finished, load_reward_model, new_member, reward_model, save_reward_model
from kedge.rollout.given import as_rollouts
from kedge.rollout.reward import (
    aggregate_scores,
    fit_support,
    judge,
    member_scores,
    normalised_on,
    scores,
)
from kedge.rollout.score import head_scores, inputs, token_values
from kedge.structs import Rollouts
from kedge.train.reward_model import raw_scores

KINDS = {
    "one": {"models": 1, "heads": 1, "lora_rank": None},
    "separate": {"models": 3, "heads": 1, "lora_rank": None},
    "shared": {"models": 1, "heads": 3, "lora_rank": None},
    "lora": {"models": 2, "heads": 1, "lora_rank": 2},
}
CORRECTION = LengthCorrection((2.0, 8.0, 20.0), (0.0, 0.5, -0.3))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["the desk is open until six"] * 5, vocab=280)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def policy(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return scratch_policy(tokenizer, family=request.param, hidden=16, layers=2, heads=4, context=40, seed=1)


def answers(tokenizer: Any, count: int, seed: int = 0, longest: int = 20) -> Rollouts:
    """Random responses of one to `longest` tokens; half of them end with EOS."""
    generator = torch.Generator().manual_seed(seed)

    def ids(most: int) -> list[int]:
        length = int(torch.randint(1, most + 1, (1,), generator=generator))
        return torch.randint(7, 280, (length,), generator=generator).tolist()

    said = [ids(longest - 1) + [tokenizer.eos_token_id] * (row % 2) for row in range(count)]
    return as_rollouts([ids(8) for _ in range(count)], said, tokenizer.pad_token_id)


def trained(policy: Any, seed: int, *, heads: int, lora_rank: int | None) -> Any:
    """A member after something like training: every parameter that learns has moved."""
    model = new_member(policy, seed, heads=heads, lora_rank=lora_rank)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def built(policy: Any, kind: str, **settings: Any) -> RewardModel:
    how = KINDS[kind]
    models = [
        finished(trained(policy, seed, heads=how["heads"], lora_rank=how["lora_rank"])) for seed in range(how["models"])
    ]
    return reward_model(models, **settings)


def raw_of(model: RewardModel, rollouts: Rollouts) -> list[list[float]]:
    """[B][M] the bare forward pass of transformers, one response at a time, no padding."""
    found = []
    for row in range(len(rollouts)):
        prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
        ids = torch.cat([prompt, rollouts.response_ids[row][rollouts.response_mask[row]]])[None]
        with torch.no_grad():
            found.append([value for one in model.models for value in one(ids, use_cache=False).logits[0].tolist()])
    return found


def aggregated(model: RewardModel, raw: list[float]) -> float:
    normal = [(value - mean) / scale for value, mean, scale in zip(raw, model.means, model.scales, strict=True)]
    if model.aggregate == "worst":
        return min(normal)
    variance = statistics.variance(normal) if len(normal) > 1 else 0.0
    return statistics.fmean(normal) - (model.variance_weight * variance if model.aggregate != "mean" else 0.0)


def interpolated(length: int) -> float:
    knots = list(zip(CORRECTION.lengths, CORRECTION.values, strict=True))
    if length <= knots[0][0]:
        return knots[0][1]
    for (left, low), (right, high) in pairwise(knots):
        if length <= right:
            return low + (high - low) * (length - left) / (right - left)
    return knots[-1][1]


# Scores


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregate", ["mean", "worst", "mean_minus_variance"])
def test_the_score_is_that_of_a_loop(policy: Any, tokenizer: Any, kind: str, aggregate: Any) -> None:
    sample, rollouts = answers(tokenizer, 25, seed=1), answers(tokenizer, 9, seed=2)
    model = built(policy, kind, aggregate=aggregate, variance_weight=0.4)
    model = normalised_on(replace(model, correction=CORRECTION), sample)
    reference = raw_of(model, sample)
    for member, column in enumerate(zip(*reference, strict=True)):
        assert model.means[member] == pytest.approx(statistics.fmean(column), abs=1e-5)
        assert model.scales[member] == pytest.approx(statistics.stdev(column), rel=1e-4)
    usual = [aggregated(model, raw) - interpolated(int(n)) for raw, n in zip(reference, sample.lengths, strict=True)]
    assert model.shift == pytest.approx(statistics.fmean(usual), abs=1e-5)
    assert model.scale == pytest.approx(statistics.stdev(usual), rel=1e-4)
    found = judge(model, rollouts)
    for row, raw in enumerate(raw_of(model, rollouts)):
        score = (aggregated(model, raw) - interpolated(int(rollouts.lengths[row])) - model.shift) / model.scale
        assert float(found.score[row]) == pytest.approx(score, abs=2e-4)
        assert float(aggregate_scores(model, rollouts)[row]) == pytest.approx(aggregated(model, raw), abs=2e-4)
    assert torch.equal(found.score, scores(model, rollouts))
    assert torch.equal(found.members, member_scores(model, rollouts))
    assert found.members.shape == (9, model.members) and found.distance is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_final_score_has_mean_0_and_deviation_1_on_the_sample(policy: Any, tokenizer: Any, kind: str) -> None:
    sample = answers(tokenizer, 40, seed=1)
    model = normalised_on(replace(built(policy, kind, aggregate="worst"), correction=CORRECTION), sample)
    again = normalised_on(model, sample)
    assert (again.means, again.scales) == (model.means, model.scales)
    assert again.shift == pytest.approx(model.shift) and again.scale == pytest.approx(model.scale)
    found = scores(model, sample)
    assert float(found.mean()) == pytest.approx(0, abs=1e-5) and float(found.std()) == pytest.approx(1, abs=1e-4)


def test_one_member_is_its_normalised_logit_to_the_bit(policy: Any, tokenizer: Any) -> None:
    sample = answers(tokenizer, 30, seed=1)
    model = normalised_on(built(policy, "one", aggregate="mean_minus_variance", variance_weight=0.5), sample)
    assert (model.shift, model.scale) == (0.0, 1.0)
    raw = raw_scores(model.models[0], sample)[:, 0]
    assert (model.means, model.scales) == ((float(raw.mean()),), (float(raw.std()),))
    assert torch.equal(scores(model, sample), (raw - model.means[0]) / model.scales[0])


def test_scores_that_cannot_be_normalised_are_refused(policy: Any, tokenizer: Any) -> None:
    model, sample = built(policy, "separate"), answers(tokenizer, 12)
    with torch.no_grad():
        model.models[1].score.weight.zero_()
    with pytest.raises(InputError, match="do not vary"):
        normalised_on(model, sample)
    with torch.no_grad():
        model.models[1].score.weight.fill_(math.nan)
    with pytest.raises(DivergenceError, match="not finite"):
        normalised_on(model, sample)
    with pytest.raises(InputError, match="do not vary"):
        normalised_on(built(policy, "one"), answers(tokenizer, 1))


# Members


def test_adapters_start_silent_train_alone_and_merge_into_plain_weights(policy: Any, tokenizer: Any) -> None:
    rollouts = answers(tokenizer, 10)
    plain, model = new_member(policy, 3), new_member(policy, 3, lora_rank=2)
    assert torch.equal(head_scores(model, rollouts), head_scores(plain, rollouts))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        head_scores(model, rollouts)[:5].sum().sub(head_scores(model, rollouts)[5:].sum()).backward()
        optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "score.weight" in moved and all("lora_" in name or name == "score.weight" for name in moved)
    assert any("lora_B" in name for name in moved)
    expected = head_scores(model, rollouts).detach()
    merged = finished(model)
    torch.testing.assert_close(head_scores(merged, rollouts), expected, atol=1e-5, rtol=1e-5)
    assert set(merged.state_dict()) == set(plain.state_dict()) and type(merged) is type(plain)
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_members_differ_by_seed_and_repeat_with_it(policy: Any) -> None:
    for rank in (None, 2):
        one, same, other = (new_member(policy, seed, heads=2, lora_rank=rank).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not torch.equal(one["score.weight"], other["score.weight"])
        assert not torch.equal(one["score.weight"][0], one["score.weight"][1])


def test_heads_that_are_not_kept_go(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    rollouts = answers(tokenizer, 6)
    model = new_member(policy, 1, heads=3)
    expected = head_scores(model, rollouts).detach()
    left = finished(model, heads=(2, 0))
    assert torch.equal(head_scores(left, rollouts), expected[:, [2, 0]])
    save_reward_model(reward_model([left]), tokenizer, tmp_path / "reward")
    assert json.loads((tmp_path / "reward" / "config.json").read_text()).get("id2label", {}).keys() != {"0", "1", "2"}
    torch.testing.assert_close(
        member_scores(load_reward_model(tmp_path / "reward"), rollouts), expected[:, [2, 0]], atol=1e-6, rtol=0
    )


# Folders


def plain_scores(folder: Path, rollouts: Rollouts, side: str) -> torch.Tensor:
    """[B, labels] what a user without Kedge gets, batched with the tokenizer's padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    rows = []
    for row in range(len(rollouts)):
        prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
        rows.append(torch.cat([prompt, rollouts.response_ids[row][rollouts.response_mask[row]]]).tolist())
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    if side == "left" and hasattr(model, "transformer"):  # GPT-2 counts positions from the left edge unless told
        batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        logits: torch.Tensor = model(**batch).logits
    return logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_folder_gives_plain_transformers_the_raw_score(
    policy: Any, tokenizer: Any, tmp_path: Path, kind: str, side: str
) -> None:
    rollouts = answers(tokenizer, 8, seed=5)
    model = normalised_on(built(policy, kind), answers(tokenizer, 30, seed=1))
    save_reward_model(model, tokenizer, tmp_path / "reward")
    folders = sorted(path.parent for path in (tmp_path / "reward").rglob("config.json"))
    assert len(folders) == len(model.models)
    found = torch.cat([plain_scores(folder, rollouts, side) for folder in folders], dim=1)
    torch.testing.assert_close(found, torch.tensor(raw_of(model, rollouts)), atol=1e-5, rtol=0)


def test_padding_that_is_eos_does_not_move_the_score(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Plain transformers looks for the last token that is not padding; EOS must count as one that is not."""
    single = copy.deepcopy(tokenizer)
    single.pad_token = single.eos_token
    rollouts = answers(single, 8, seed=5)
    model = normalised_on(built(policy, "one"), answers(single, 30, seed=1))
    expected = raw_scores(model.models[0], rollouts)
    save_reward_model(model, single, tmp_path / "reward")
    assert single.pad_token == single.eos_token, "the run's tokenizer is left alone"
    for _ in range(2):
        torch.testing.assert_close(plain_scores(tmp_path / "reward", rollouts, "right"), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(raw_scores(model.models[0], rollouts), expected, atol=1e-5, rtol=0)
        save_reward_model(load_reward_model(tmp_path / "reward"), single, tmp_path / "reward")


def test_one_member_is_an_ordinary_folder(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = normalised_on(built(policy, "one"), answers(tokenizer, 30, seed=1))
    save_reward_model(model, tokenizer, tmp_path / "kedge")
    reference = model.models[0]
    save_model(reference, tokenizer, tmp_path / "plain")
    files = {path.name: path.read_bytes() for path in (tmp_path / "kedge").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    config = json.loads(files["config.json"])
    assert (config["kedge_score_mean"], config["kedge_score_scale"]) == (model.means[0], model.scales[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_comes_back_bit_for_bit(policy: Any, tokenizer: Any, tmp_path: Path, kind: str) -> None:
    rollouts = answers(tokenizer, 12, seed=5)
    model = built(policy, kind, aggregate="mean_minus_variance", variance_weight=0.3)
    if kind != "one":
        model = replace(model, correction=CORRECTION)
    model = normalised_on(model, answers(tokenizer, 30, seed=1))
    model = replace(model, support=fit_support(model, answers(tokenizer, 60, seed=2), answers(tokenizer, 40, seed=3)))
    save_reward_model(model, tokenizer, tmp_path / "reward")
    again = load_reward_model(tmp_path / "reward")
    before, after = judge(model, rollouts), judge(again, rollouts)
    assert torch.equal(before.score, after.score) and torch.equal(before.members, after.members)
    assert torch.equal(before.distance, after.distance)
    assert (again.shift, again.scale, again.correction) == (model.shift, model.scale, model.correction)
    assert again.support.longest == model.support.longest and again.support.limit == model.support.limit
    assert not any(parameter.requires_grad for one in again.models for parameter in one.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["reward"]


def test_a_users_own_classifier_is_one_member(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    rollouts, model = answers(tokenizer, 5), new_member(policy, 4)
    save_model(model, tokenizer, tmp_path / "own")
    again = load_reward_model(tmp_path / "own")
    assert again.members == 1 and again.support is None and again.correction is None
    torch.testing.assert_close(scores(again, rollouts), head_scores(model, rollouts)[:, 0], atol=1e-6, rtol=0)


DAMAGE = {
    "no json": ("reward.json", "{", "Invalid JSON"),
    "another schema": ("reward.json", {"schema": 2}, "schema: Input should be 1"),
    "outside": ("reward.json", {"models": [{"folder": "../other", "heads": 1}]}, "folder: String should match"),
    "too few numbers": ("reward.json", {"means": [0.0]}, "1 means and 3 scales for 3 members"),
    "no scale": ("reward.json", {"scales": [1.0, 0.0, 1.0]}, "scales.1: Input should be greater than 0"),
    "not finite": ("reward.json", {"shift": "NaN"}, "shift: Input should be a finite number"),
    "an aggregate nobody knows": ("reward.json", {"aggregate": "best"}, "aggregate: Input should be"),
    "knots that fall": ("reward.json", {"correction": {"lengths": [2, 1], "values": [0, 1]}}, "lengths must increase"),
    "other heads": (
        "reward.json",
        {"models": [{"folder": ".", "heads": 2}], "means": [0, 0], "scales": [1, 1]},
        "load",
    ),
    "support cut short": ("support.safetensors", b"\x00" * 20, "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(policy: Any, tokenizer: Any, tmp_path: Path, damage: str) -> None:
    model = normalised_on(built(policy, "shared"), answers(tokenizer, 30, seed=1))
    model = replace(model, support=fit_support(model, answers(tokenizer, 30, seed=2), answers(tokenizer, 9, seed=3)))
    save_reward_model(model, tokenizer, tmp_path / "reward")
    name, change, message = DAMAGE[damage]
    path = tmp_path / "reward" / name
    if isinstance(change, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        path.write_bytes(change if isinstance(change, bytes) else change.encode())
    with pytest.raises(InputError) as refused:
        load_reward_model(tmp_path / "reward")
    (problem,) = refused.value.problems
    assert message in problem.what and "\n" not in problem.what


def test_a_support_of_another_model_is_refused(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = built(policy, "one")
    other = fit_support(model, answers(tokenizer, 30), answers(tokenizer, 9))
    narrow = replace(other, mean=other.mean[:4], factor=other.factor[:4, :4])
    save_reward_model(replace(model, support=narrow), tokenizer, tmp_path / "reward")
    with pytest.raises(InputError, match="belongs to another model"):
        load_reward_model(tmp_path / "reward")


# Support


def test_the_distance_is_that_of_a_loop(policy: Any, tokenizer: Any) -> None:
    model = built(policy, "separate")
    known, new = answers(tokenizer, 80, seed=2), answers(tokenizer, 60, seed=3)
    support = fit_support(model, known, new)
    states = []

    def keep(module: Any, given: Any) -> None:
        states.append(given[0][0, -1].double())

    handle = model.models[0].score.register_forward_pre_hook(keep)
    raw_of(replace(model, models=model.models[:1]), known)
    raw_of(replace(model, models=model.models[:1]), new)
    handle.remove()
    training, fresh = torch.stack(states[:80]), torch.stack(states[80:])
    centred = training - training.mean(dim=0)
    sample = centred.T @ centred / 80
    size = sample.trace() / 16 * torch.eye(16)
    error = sum(float((torch.outer(x, x) - sample).square().sum()) for x in centred) / 80**2
    share = error / float((sample - size).square().sum())
    inverse = torch.linalg.inv((1 - share) * sample + share * size)
    expected = torch.stack([((x - training.mean(0)) @ inverse @ (x - training.mean(0))).sqrt() for x in fresh])
    found = judge(replace(model, support=support), new).distance
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        support.percentiles, torch.quantile(expected, torch.arange(101).double() / 100), rtol=1e-3, atol=1e-4
    )
    ordered = sorted(known.lengths.tolist())
    at = 0.99 * 79
    assert support.longest == pytest.approx(ordered[78] + (at - 78) * (ordered[79] - ordered[78]))


def test_what_is_unlike_the_training_data_is_far_away(policy: Any, tokenizer: Any) -> None:
    model = built(policy, "one")
    support = fit_support(model, answers(tokenizer, 300, seed=2), answers(tokenizer, 300, seed=3))
    model = replace(model, support=support)
    alike = judge(model, answers(tokenizer, 300, seed=4)).distance
    assert float((alike > support.limit).float().mean()) <= 0.04, "one in a hundred, within chance"
    same = torch.full((20, 15), 9)
    strange = as_rollouts(same.tolist(), same.tolist(), tokenizer.pad_token_id)
    assert float((judge(model, strange).distance).mean()) > float(alike.mean())


def test_states_that_do_not_vary_are_refused(policy: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="do not vary"):
        fit_support(built(policy, "one"), answers(tokenizer, 1), answers(tokenizer, 1))


# The critic


@pytest.mark.parametrize("kind", KINDS)
def test_the_critic_starts_from_the_members_on_the_first_trunk(policy: Any, tokenizer: Any, kind: str) -> None:
    sample, rollouts = answers(tokenizer, 30, seed=1), answers(tokenizer, 6)
    model = normalised_on(built(policy, kind), sample)
    critic = Critic.from_reward_model(model, ("kl", "score"), 1)
    last = rollouts.prompt_ids.shape[1] + rollouts.last
    found = critic(**inputs(rollouts))[torch.arange(6), last, 1].detach()
    for row, raw in enumerate(raw_of(model, rollouts)):
        normal = [(value - mean) / scale for value, mean, scale in zip(raw, model.means, model.scales, strict=True)]
        here = normal if kind == "shared" else normal[:1]
        assert float(found[row]) == pytest.approx((statistics.fmean(here) - model.shift) / model.scale, abs=2e-4)
    if kind in ("one", "shared"):
        torch.testing.assert_close(found, scores(model, rollouts), atol=1e-4, rtol=1e-4)
    assert (token_values(critic, rollouts)[..., 0] == 0).all()
