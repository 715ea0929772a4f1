"""The veRL recorder against objects shaped like those of the published trainers; veRL itself does not run here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kedge.errors import InputError
from kedge.recorders import verl
from kedge.trace.jsonl import read_json_lines
from kedge.trace.reader import Run, read_run

EOS, PAD = 2, 0
LENGTHS = (3, 5, 4, 2)
PROMPTS = ([5, 6, 7], [5, 6, 7], [8], [8])
UIDS = ("b", "b", "a", "a")


class Tokenizer:
    eos_token_id = EOS
    pad_token_id = PAD

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(f"w{token}" for token in ids if not (skip_special_tokens and token in (EOS, PAD)))


def config(**algorithm: Any) -> dict[str, Any]:
    """The keys of veRL's ppo_trainer.yaml that matter here."""
    return {
        "algorithm": {
            "adv_estimator": "gae",
            "gamma": 1.0,
            "lam": 0.95,
            "norm_adv_by_std_in_grpo": True,
            "use_kl_in_reward": True,
            "kl_penalty": "kl",
            "kl_ctrl": {"type": "adaptive", "kl_coef": 0.001, "target_kl": 0.1, "horizon": 10000},
            **algorithm,
        },
        "actor_rollout_ref": {
            "actor": {
                "clip_ratio": 0.2,
                "clip_ratio_low": 0.2,
                "clip_ratio_high": 0.28,
                "use_kl_loss": False,
                "kl_loss_coef": 0.001,
                "kl_loss_type": "low_var_kl",
                "ppo_epochs": 2,
                "ppo_mini_batch_size": 2,
                "loss_agg_mode": "token-mean",
                "optim": {"lr": 1e-6},
            },
            "rollout": {"n": 2, "temperature": 0.7},
        },
        "data": {"train_batch_size": 4, "max_response_length": 8},
        "trainer": {"rollout_data_dir": "dump"},
    }


def step_data(seed: int, *, beta: float = 0.07, lam: float = 0.95) -> dict[str, list[np.ndarray]]:
    """Four responses with rewards, GAE and whitening as veRL computes them, by a loop of this test's own."""
    rng = np.random.default_rng(seed)
    data: dict[str, list[np.ndarray]] = {
        name: [rng.normal(-1, 0.3, length).astype(np.float32) for length in LENGTHS]
        for name in ("rollout_log_probs", "old_log_probs", "ref_log_prob", "values", "entropy")
    }
    data["responses"] = [rng.integers(10, 90, length) for length in LENGTHS]
    for row in (0, 2, 3):
        data["responses"][row][-1] = EOS
    data["prompts"] = [np.array(ids) for ids in PROMPTS]
    data["response_mask"] = [np.ones(length, dtype=np.int64) for length in LENGTHS]
    data["rm_scores"] = []
    for length in LENGTHS:
        scores = np.zeros(length, dtype=np.float32)
        scores[-1] = rng.normal()
        data["rm_scores"].append(scores)
    data["token_level_rewards"] = [
        score - beta * (old - reference)
        for score, old, reference in zip(data["rm_scores"], data["old_log_probs"], data["ref_log_prob"], strict=True)
    ]
    advantages = []
    for rewards, values in zip(data["token_level_rewards"], data["values"], strict=True):
        carried, following, out = 0.0, 0.0, np.zeros(len(rewards))
        for t in reversed(range(len(rewards))):
            carried = rewards[t] + following - values[t] + lam * carried
            following, out[t] = values[t], carried
        advantages.append(out)
    every = np.concatenate(advantages)
    data["advantages"] = [
        ((one - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8)).astype(np.float32) for one in advantages
    ]
    return data


class PPOTrainer:
    """As `verl.trainer.ppo.v1.trainer_base.PPOTrainer`, in what the recorder touches."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.config, self.tokenizer, self.global_steps = settings, Tokenizer(), 1
        self.dumped: list[str] = []

    def _log_rollout_data(self, batch: Any, timing_raw: dict[str, float], rollout_data_dir: str) -> None:
        self.dumped.append(rollout_data_dir)


def nested(rows: list[np.ndarray]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.as_tensor(row) for row in rows], layout=torch.jagged)


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A transfer queue that gives the fields it has, as the trainer's own `_compute_advantage` expects of it."""
    stored: dict[str, Any] = {}

    def kv_batch_get(keys: list[str], partition_id: str, select_fields: list[str]) -> dict[str, Any]:
        assert partition_id == "train"
        return {name: stored["fields"][name] for name in select_fields if name in stored["fields"]}

    module = ModuleType("transfer_queue")
    module.kv_batch_get = kv_batch_get  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transfer_queue", module)
    return stored


def put(queue: dict[str, Any], data: dict[str, list[np.ndarray]]) -> SimpleNamespace:
    """A v1 batch of the rows and one that veRL appended to fill a mini-batch."""
    filling = {"prompts": np.full(3, EOS), "responses": np.array([EOS]), "response_mask": np.zeros(1, dtype=np.int64)}
    fields: dict[str, Any] = {
        name: nested([*rows, filling.get(name, np.zeros(1, dtype=np.float32))]) for name, rows in data.items()
    }
    fields["uid"] = np.array([*UIDS, "pad0"], dtype=object)
    queue["fields"] = fields
    tags = [{"status": "success", "min_global_steps": 3, "max_global_steps": 4} for _ in UIDS]
    tags.append({**tags[0], "is_padding": True})
    return SimpleNamespace(keys=[f"{uid}_0_0" for uid in (*UIDS, "pad0")], partition_id="train", tags=tags, fields=None)


def test_a_v1_step_comes_back_whole(tmp_path: Path, queue: dict[str, Any]) -> None:
    class Base(PPOTrainer):
        pass

    class Sync(Base):
        """What the registry would pick."""

    recorder = verl.record(Base, tmp_path / "run", name="mine")
    trainer = Sync(config())
    for number in (1, 2):
        trainer.global_steps = number
        trainer._log_rollout_data(put(queue, step_data(number)), {}, "dump")
    assert trainer.dumped == ["dump", "dump"]
    recorder.close()

    run = read_run(tmp_path / "run")
    assert (run.name, run.manifest["status"], run.manifest["absent"]) == (
        "mine",
        "finished",
        sorted(run.step(0).absent),
    )
    assert run.steps() == (0, 1)
    step, data = run.step(0), step_data(1)
    assert step.channels == ("score", "kl", "critic")  # nothing is left to explain
    for row, length in enumerate(LENGTHS):
        assert step.advantage()[row, :length] == pytest.approx(data["advantages"][row], abs=1e-5)
        assert step.tokens["behaviour_logprob"][row, :length] == pytest.approx(data["rollout_log_probs"][row])
        assert step.tokens["reference_logprob"][row, :length] == pytest.approx(data["ref_log_prob"][row])
        assert step.tokens["entropy"][row, :length] == pytest.approx(data["entropy"][row])
        assert step.rewards[row, length - 1, 0] == pytest.approx(data["rm_scores"][row][-1])
    assert step.weights[:, 1] == pytest.approx([-0.07] * 4, rel=1e-5)  # the step's own beta, not where the next begins
    assert step.ended.tolist() == [True, False, True, True]
    assert step.group.tolist() == [0, 0, 1, 1]
    assert step.responses[3] == f"w{data['responses'][3][0]}"
    assert {"new_logprob", "active", "old_eos_logprob", "reference_eos_logprob"} == step.absent
    assert (step.learning["clip"], step.learning["clip_high"]) == (0.2, 0.28)
    assert [line["kl/beta"] for line in run_lines(run)] == pytest.approx([0.07, 0.07], rel=1e-5)


def run_lines(run: Run) -> list[dict[str, Any]]:
    return read_json_lines(run.dir.metrics)


class RayPPOTrainer(PPOTrainer):
    """As the legacy trainer: another signature, and one padded tensor a field."""

    def _log_rollout_data(  # type: ignore[override]
        self, batch: Any, reward_extra_infos_dict: dict[str, Any], timing_raw: dict[str, float], rollout_data_dir: str
    ) -> None:
        self.dumped.append(rollout_data_dir)


def proto(data: dict[str, list[np.ndarray]]) -> SimpleNamespace:
    """A `DataProto`: prompts padded on the left, responses on the right."""
    wide, long = max(map(len, data["prompts"])), max(LENGTHS)

    def right(rows: list[np.ndarray]) -> torch.Tensor:
        return torch.stack([torch.as_tensor(np.pad(row, (0, long - len(row)))) for row in rows])

    def left(rows: list[np.ndarray]) -> torch.Tensor:
        return torch.stack([torch.as_tensor(np.pad(row, (wide - len(row), 0))) for row in rows])

    batch = {name: right(rows) for name, rows in data.items() if name not in ("prompts", "rm_scores", "entropy")}
    batch["prompts"] = left(data["prompts"])
    batch["token_level_scores"] = right(data["rm_scores"])
    asked = left([np.ones(len(ids), dtype=np.int64) for ids in data["prompts"]])
    batch["attention_mask"] = torch.cat([asked, right([np.ones(length, dtype=np.int64) for length in LENGTHS])], dim=1)
    return SimpleNamespace(batch=batch, non_tensor_batch={"uid": np.array(UIDS, dtype=object)})


def test_a_legacy_group_relative_step(tmp_path: Path) -> None:
    class Trainer(RayPPOTrainer):
        pass

    data = step_data(5)
    del data["values"]
    data["response_mask"][1][2] = 0  # a tool's token
    scores = np.array([row[-1] for row in data["rm_scores"]], dtype=np.float64)
    advantages = []
    for row, length in enumerate(LENGTHS):
        pair = scores[[0, 1]] if row < 2 else scores[[2, 3]]
        value = (scores[row] - pair.mean()) / (pair.std(ddof=1) + 1e-6)
        advantages.append((np.full(length, value) * data["response_mask"][row]).astype(np.float32))
    data["advantages"], data["token_level_rewards"] = advantages, data["rm_scores"]
    settings = config(adv_estimator="grpo", use_kl_in_reward=False)
    settings["actor_rollout_ref"]["actor"] |= {"use_kl_loss": True, "kl_loss_coef": 0.04, "kl_loss_type": "low_var_kl+"}
    recorder = verl.record(Trainer, tmp_path / "run", text="none")
    Trainer(settings)._log_rollout_data(proto(data), {}, {}, "dump")

    recorder.close()
    run = read_run(tmp_path / "run")
    step = run.step(0)
    assert step.channels == ("score", "kl")
    assert step.advantage()[1, :5] == pytest.approx(advantages[1], abs=1e-5)
    assert step.response_mask[1].tolist() == [True, True, False, True, True]
    assert step.loss_beta == pytest.approx([0.04] * 4)
    assert step.weights[:, 1] == pytest.approx([0.0] * 4)
    assert step.learning["kl_loss"] == "k2"  # the gradient of k3+ is k2's
    assert step.responses == (None,) * 4
    assert run.manifest["conventions"]["normalisation"] == "group mean and deviation"


def test_conventions_say_what_verl_means() -> None:
    found = verl.conventions_of(config())
    assert (found.kl, found.kl_estimator, found.kl_unit) == ("reward", "k1", "per token")
    assert np.isnan(found.beta)  # a controller moves it
    assert (found.normalisation, found.critic, found.lam) == ("batch", True, 0.95)
    assert (found.epochs, found.minibatches, found.aggregation) == (2, 2, "token_mean")
    fixed = verl.conventions_of(config(kl_ctrl={"type": "fixed", "kl_coef": 0.02}, kl_penalty="low_var_kl"))
    assert (fixed.beta, fixed.kl_estimator) == (0.02, "k3")
    rloo = verl.conventions_of(config(adv_estimator="rloo", use_kl_in_reward=False))
    assert (rloo.normalisation, rloo.kl, rloo.lam) == ("leave one out", "none", 1.0)
    other = verl.conventions_of(config(adv_estimator="opo"))
    assert other.normalisation == "unknown"
    assert verl.settings_of(config())["policy"]["temperature"] == 0.7


@pytest.mark.parametrize(
    ("penalty", "formula"),
    [
        ("abs", np.abs),
        ("mse", lambda ratio: ratio**2 / 2),
        ("low_var_kl", lambda ratio: np.exp(-ratio) + ratio - 1),
    ],
)
def test_beta_is_solved_under_every_penalty(penalty: str, formula: Any, queue: dict[str, Any]) -> None:
    data = step_data(3)
    data["token_level_rewards"] = [
        score - np.float32(0.3) * formula(old - reference)
        for score, old, reference in zip(data["rm_scores"], data["old_log_probs"], data["ref_log_prob"], strict=True)
    ]
    found = verl.columns(put(queue, data))
    rows = verl.rows_of(found, config(kl_penalty=penalty), step=0)
    assert rows is not None
    assert rows.beta == pytest.approx(0.3, rel=1e-5)


def test_a_step_without_a_token_to_learn_from_is_none(queue: dict[str, Any]) -> None:
    data = step_data(3)
    data["response_mask"] = [np.zeros(length, dtype=np.int64) for length in LENGTHS]
    assert verl.rows_of(verl.columns(put(queue, data)), config(), step=0) is None


def test_scores_per_token_stay_where_they_are(queue: dict[str, Any]) -> None:
    data = step_data(3)
    data["rm_scores"][1] = np.arange(5, dtype=np.float32)
    rows = verl.rows_of(verl.columns(put(queue, data)), config(), step=0)
    assert rows is not None
    assert rows.scores["score"].shape == (4, 5)
    assert rows.scores["score"][1].tolist() == [0, 1, 2, 3, 4]


def test_a_fault_at_first_is_raised_and_a_later_one_ends_the_recording(tmp_path: Path, queue: dict[str, Any]) -> None:
    class Taken(PPOTrainer):
        pass

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "something").write_text("of somebody", encoding="utf-8")
    verl.record(Taken, tmp_path / "taken")
    with pytest.raises(InputError, match="not empty"):
        Taken(config())._log_rollout_data(put(queue, step_data(1)), {}, "dump")

    class Base(PPOTrainer):
        pass

    verl.record(Base, tmp_path / "run")
    trainer = Base(config())
    trainer._log_rollout_data(put(queue, step_data(1)), {}, "dump")
    with pytest.warns(UserWarning, match="the training goes on"):
        trainer._log_rollout_data(put(queue, step_data(2)), {}, "dump")  # the same step again
    trainer._log_rollout_data(put(queue, step_data(3)), {}, "dump")
    assert trainer.dumped == ["dump"] * 3
