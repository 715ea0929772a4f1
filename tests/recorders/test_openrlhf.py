"""The OpenRLHF recorder against objects shaped like the published ones; OpenRLHF itself does not run here.

`Maker` stands for its `RemoteExperienceMaker`: the same methods in the same order, which lose and change the same
things, with the equations written again as loops.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kedge.recorders import openrlhf
from kedge.trace.jsonl import read_json_lines
from kedge.trace.reader import StepTrace, read_run

ANSWERS = 2
LENGTHS = (3, 5, 4, 2)  # in the order of the prompts
PROMPTS = ([5, 6, 7], [5, 6, 7], [8], [8])
ORDER = ((2, 0), (3, 1))  # micro-batches, as a dynamic batch size may mix them


def options(estimator: str = "gae", **more: Any) -> SimpleNamespace:
    """The options of OpenRLHF 0.11 that matter here; `more` are dotted names with _ for the dots' last part."""
    args = SimpleNamespace(
        algo=SimpleNamespace(
            kl=SimpleNamespace(estimator="k1", use_loss=False, init_coef=0.1, target=None),
            advantage=SimpleNamespace(estimator=estimator, gamma=1.0, lambd=0.95, no_std_norm=False),
        ),
        rollout=SimpleNamespace(n_samples_per_prompt=ANSWERS, temperature=0.8, max_new_tokens=8, batch_size=2),
        train=SimpleNamespace(max_epochs=1, batch_size=2),
        actor=SimpleNamespace(eps_clip=0.2, eps_clip_low_high=(0.2, 0.28), adam=SimpleNamespace(lr=1e-6)),
        critic=SimpleNamespace(adam=SimpleNamespace(lr=9e-6)),
        reward=SimpleNamespace(clip_range=(-10, 10), overlong_buffer_len=None, stop_properly_penalty_coef=None),
    )
    for path, value in more.items():
        *sections, name = path.split("__")
        holder = args
        for section in sections:
            holder = getattr(holder, section)
        setattr(holder, name, value)
    return args


class Tokenizer:
    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(f"w{token}" for token in ids)


class Maker:
    """As `openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker`."""

    def __init__(self, args: Any, seed: int = 0) -> None:
        self.args, self.tokenizer = args, Tokenizer()
        self.kl_ctl = SimpleNamespace(value=args.algo.kl.init_coef)
        self.truth = made_up(seed)

    def make_experience_batch(self, rollout_samples: Any) -> list[SimpleNamespace]:
        experiences = self.make_experience(rollout_samples)
        return self.compute_advantages_and_returns(experiences)

    def make_experience(self, _: Any) -> list[SimpleNamespace]:
        charged, critic = not self.args.algo.kl.use_loss, self.args.algo.advantage.estimator == "gae"
        return [micro_batch(self.truth, rows, charged=charged, critic=critic) for rows in ORDER]

    def compute_advantages_and_returns(self, experiences: list[SimpleNamespace]) -> list[SimpleNamespace]:
        method, beta, args = self.args.algo.advantage.estimator, self.kl_ctl.value, self.args
        if args.reward.stop_properly_penalty_coef is not None:  # a fixed reward where a response was cut short
            for experience in experiences:
                for row in range(len(experience.rewards)):
                    if experience.truncated[row]:
                        experience.rewards[row] = args.reward.stop_properly_penalty_coef
        flat = {index: (one, row) for one in experiences for row, index in enumerate(one.index)}
        rewards = np.array([float(flat[index][0].rewards[flat[index][1]]) for index in range(len(LENGTHS))])
        shaped = rewards.copy()
        for start in range(0, len(rewards), ANSWERS):
            group = rewards[start : start + ANSWERS]
            for at in range(start, start + ANSWERS):
                if method == "rloo":
                    shaped[at] = rewards[at] - (group.sum() - rewards[at]) / (ANSWERS - 1)
                elif method in ("reinforce_baseline", "dr_grpo"):
                    shaped[at] = rewards[at] - group.mean()
                elif method == "group_norm":
                    shaped[at] = (rewards[at] - group.mean()) / (group.std(ddof=1) + 1e-9)
        lam = args.algo.advantage.lambd if method == "gae" else 1.0
        for index, (one, row) in flat.items():
            mask = one.action_mask[row].numpy()
            out = np.zeros(len(mask))
            carried = following = 0.0
            last = True
            for t in reversed(range(len(mask))):
                if not mask[t]:
                    continue
                reward = -beta * float(one.kl[row, t])
                if last:
                    reward, last = reward + float(np.clip(shaped[index], *args.reward.clip_range)), False
                value = float(one.values[row, t]) if method == "gae" else 0.0
                carried = reward + following - value + lam * carried
                following, out[t] = value, carried
            one.advantages[row] = torch.from_numpy(out)
        for one in experiences:
            one.kl = None
        if method in ("gae", "reinforce", "reinforce_baseline"):
            every = torch.cat([one.advantages[one.action_mask] for one in experiences])
            for one in experiences:
                one.advantages = (one.advantages - every.mean()) * (1 / every.std(correction=0))
        return experiences


def made_up(seed: int) -> dict[str, list[np.ndarray]]:
    """Responses in the order of the prompts."""
    rng = np.random.default_rng(seed)
    numbers = ("old", "reference", "rollout", "values")
    truth = {name: [rng.normal(-1, 0.4, length).astype(np.float32) for length in LENGTHS] for name in numbers}
    truth["response"] = [rng.integers(10, 90, length) for length in LENGTHS]
    truth["reward"] = [np.float32(rng.normal(0, 3)) for _ in LENGTHS]
    truth["reward"][1] = np.float32(14.0)  # beyond the clip
    return truth


def micro_batch(
    truth: dict[str, list[np.ndarray]], rows: tuple[int, ...], *, charged: bool, critic: bool
) -> SimpleNamespace:
    """An `Experience`: prompt and response in one row, padded on the right; token fields one shorter."""
    width = max(len(PROMPTS[row]) + LENGTHS[row] for row in rows)
    sequences, attention = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    tokens = {name: torch.zeros(len(rows), width - 1) for name in ("old", "reference", "rollout", "values")}
    action = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for at, row in enumerate(rows):
        prompt, length = PROMPTS[row], LENGTHS[row]
        sequences[at, : len(prompt) + length] = torch.tensor([*prompt, *truth["response"][row]])
        attention[at, : len(prompt) + length] = 1
        here = slice(len(prompt) - 1, len(prompt) - 1 + length)
        action[at, here] = True
        for name, values in tokens.items():
            values[at, here] = torch.from_numpy(truth[name][row])
    kl = (tokens["old"] - tokens["reference"]).clamp(-10, 10)
    return SimpleNamespace(
        index=list(rows),
        sequences=sequences,
        attention_mask=attention,
        action_mask=action,
        action_log_probs=tokens["old"],
        base_action_log_probs=None if charged else tokens["reference"],
        rollout_log_probs=tokens["rollout"],
        values=tokens["values"] if critic else None,
        advantages=torch.zeros(len(rows), width - 1, dtype=torch.float64),
        kl=kl if charged else torch.zeros_like(kl),
        rewards=torch.tensor([float(truth["reward"][row]) for row in rows]),
        truncated=torch.tensor([row == 1 for row in rows]),
        info={"response_clip_ratio": torch.tensor([[False]] * len(rows))},
    )


def recorded(tmp_path: Path, args: Any, **more: Any) -> tuple[StepTrace, list[SimpleNamespace], Maker]:
    maker = openrlhf.recording(Maker, tmp_path / "run", **more)(args)
    experiences = maker.make_experience_batch(None)
    maker.recorder.close()
    return read_run(tmp_path / "run").step(0), experiences, maker


def of_row(experiences: list[SimpleNamespace], row: int) -> np.ndarray:
    one = next(one for one in experiences if row in one.index)
    at = one.index.index(row)
    return np.asarray(one.advantages[at][one.action_mask[at]].double().numpy())


@pytest.mark.parametrize("estimator", ["gae", "reinforce", "rloo", "reinforce_baseline", "dr_grpo"])
def test_every_estimator_comes_back_with_nothing_left_to_explain(estimator: str, tmp_path: Path) -> None:
    args = options(estimator)
    if estimator != "gae":
        args.reward.clip_range = (-100, 100)
    step, experiences, maker = recorded(tmp_path, args)
    assert step.channels == (("score", "kl", "critic") if estimator == "gae" else ("score", "kl"))
    for row, length in enumerate(LENGTHS):
        assert step.advantage()[row, :length] == pytest.approx(of_row(experiences, row), abs=2e-4)
        assert step.tokens["reference_logprob"][row, :length] == pytest.approx(maker.truth["reference"][row], abs=1e-5)
        assert step.tokens["behaviour_logprob"][row, :length] == pytest.approx(maker.truth["rollout"][row])
        assert step.response_ids is not None
        assert step.response_ids[row, :length].tolist() == maker.truth["response"][row].tolist()
    assert step.weights[:, step.channels.index("kl")] == pytest.approx([-0.1] * 4)
    assert step.group.tolist() == [0, 0, 1, 1]
    assert step.ended.tolist() == [True, False, True, True]
    assert step.prompts[0] == "w5 w6 w7"


def test_what_openrlhf_returns_is_its_own(tmp_path: Path) -> None:
    plain = Maker(options()).make_experience_batch(None)
    _, experiences, _ = recorded(tmp_path, options())
    for one, other in zip(plain, experiences, strict=True):
        assert torch.equal(one.advantages, other.advantages)
        assert other.kl is None


def test_the_score_is_what_was_paid_for(tmp_path: Path) -> None:
    step, _, maker = recorded(tmp_path, options())
    scores = step.rewards[..., 0].sum(axis=1)
    assert scores[1] == pytest.approx(10.0)  # 14 is held at the clip, as OpenRLHF does
    assert scores[0] == pytest.approx(float(maker.truth["reward"][0]))


def test_a_length_penalty_is_a_channel(tmp_path: Path) -> None:
    step, experiences, _ = recorded(tmp_path, options(reward__stop_properly_penalty_coef=-0.5))
    assert step.channels == ("score", "length_penalty", "kl", "critic")
    penalty = step.rewards[..., 1].sum(axis=1)
    assert penalty == pytest.approx([0, -10.5, 0, 0])  # from 10, the clipped score, to -0.5
    assert step.advantage()[1, :5] == pytest.approx(of_row(experiences, 1), abs=2e-4)


def test_kl_in_the_loss_keeps_the_reference(tmp_path: Path) -> None:
    args = options("group_norm", algo__kl__use_loss=True, algo__kl__estimator="k3", algo__kl__init_coef=0.02)
    step, experiences, maker = recorded(tmp_path, args)
    assert step.channels == ("score", "kl")
    assert step.loss_beta == pytest.approx([0.02] * 4)
    assert step.learning["kl_loss"] == "k3"
    assert step.tokens["reference_logprob"][2, :4] == pytest.approx(maker.truth["reference"][2], abs=1e-5)
    assert step.advantage()[3, :2] == pytest.approx(of_row(experiences, 3), abs=1e-4)


def test_group_norm_leaves_the_scale_of_its_kl_to_the_rest(tmp_path: Path) -> None:
    step, experiences, _ = recorded(tmp_path, options("group_norm"))
    assert step.channels == ("score", "kl", "rest")
    for row, length in enumerate(LENGTHS):
        assert step.advantage()[row, :length] == pytest.approx(of_row(experiences, row), abs=1e-4)


def test_an_estimator_that_cannot_be_undone_leaves_no_reference(tmp_path: Path) -> None:
    step, _, _ = recorded(tmp_path, options(algo__kl__estimator="k2"))
    assert "reference_logprob" in step.absent
    assert "kl" not in step.channels


def test_steps_are_counted_and_gone_on_with(tmp_path: Path) -> None:
    first = openrlhf.recording(Maker, tmp_path / "run", text="none")(options())
    for _ in range(2):
        first.make_experience_batch(None)
    first.recorder.close()
    second = openrlhf.recording(Maker, tmp_path / "run", text="none", resume=True)(options())
    second.make_experience_batch(None)
    second.recorder.close()
    run = read_run(tmp_path / "run")
    assert run.steps() == (0, 1, 2)
    assert [line["kl/beta"] for line in read_json_lines(run.dir.metrics)] == pytest.approx([0.1] * 3)
    assert run.step(0).responses == (None,) * 4


def test_older_names_of_the_options_are_read() -> None:
    flat = SimpleNamespace(
        advantage_estimator="rloo", init_kl_coef=0.03, kl_estimator="k1", use_kl_loss=False, kl_target=None,
        gamma=1.0, lambd=1.0, eps_clip=0.2, eps_clip_low_high=None, n_samples_per_prompt=4, rollout_batch_size=64,
        train_batch_size=128, max_epochs=1, temperature=0.9, generate_max_len=32, reward_clip_range=(-10, 10),
    )  # fmt: skip
    found = openrlhf.conventions_of(flat)
    assert (found.normalisation, found.kl, found.kl_unit, found.beta) == ("leave one out", "reward", "per token", 0.03)
    assert (found.kl_credit, found.clip, found.minibatches) == ("to go", (0.2, 0.2), 2)
    settings = openrlhf.settings_of(flat)["policy"]
    assert (settings["temperature"], settings["max_new_tokens"]) == (0.9, 32)
    assert openrlhf.settings_of(options(algo__kl__target=0.1))["policy"]["kl"] == {
        "place": "reward", "beta": 0.1, "mode": "adaptive",
    }  # fmt: skip
