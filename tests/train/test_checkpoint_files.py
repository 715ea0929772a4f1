"""A checkpoint puts everything back bit for bit, is there whole or not at all, and says what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_learner import experience, learner, weights_of

from kedge.errors import InputError
from kedge.train import checkpoint
from kedge.train.checkpoint import State, Watched
from kedge.train.controller import Adaptive, Controllers, Fixed
from kedge.train.policy import running_variance
from kedge.train.update import Learner, UpdateSettings, update

CONTROLLER = Controllers.of(Adaptive(0.1 + 1e-17, 6.0, 1000.0))


def step(of: Learner, seed: int = 0) -> torch.Tensor:
    batch = experience(of)
    variance = running_variance(None, batch)
    settings = UpdateSettings(epochs=1, minibatches=2, clip=0.2)
    update(of, batch, settings, torch.Generator().manual_seed(seed), return_variance=variance)
    return variance


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}/{name}": value for index, held in state.items() for name, value in held.items()}


@pytest.mark.parametrize("scalar", [False, True])
def test_back_bit_for_bit(scalar: bool, tmp_path: Path) -> None:
    of = learner(scalar)
    variance = step(of)
    of.critic.calibrate(torch.full((len(of.critic.names),), 0.3), torch.full((len(of.critic.names),), 1.7))
    saved = State(1, CONTROLLER, variance)
    checkpoint.save(tmp_path / "step-000001", of, saved, keep=2)
    fresh = learner(scalar, seed=8)
    assert not same(weights_of(fresh.policy), weights_of(of.policy))
    found = checkpoint.load(tmp_path / "step-000001", fresh)
    assert (found.step, found.controller) == (1, CONTROLLER)
    assert torch.equal(found.return_variance, variance)
    assert same(weights_of(fresh.policy), weights_of(of.policy))
    assert same(weights_of(fresh.critic), weights_of(of.critic)), "heads, shift and scale included"
    for one, other in ((of.optimizer, fresh.optimizer), (of.critic_optimizer, fresh.critic_optimizer)):
        assert len(moments(one)) > 10
        assert same(moments(one), moments(other))
        assert one.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    step(of, seed=1)
    step(fresh, seed=1)
    assert same(weights_of(fresh.policy), weights_of(of.policy)), "the next step is the same, too"
    assert same(weights_of(fresh.critic), weights_of(of.critic))


def test_before_the_first_step(tmp_path: Path) -> None:
    of = learner()
    checkpoint.save(tmp_path / "step-000000", of, State(0, CONTROLLER), keep=1)
    found = checkpoint.load(tmp_path / "step-000000", learner(seed=8))
    assert found == State(0, CONTROLLER, None)


def test_the_newest_are_kept_and_the_newest_whole_one_is_found(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None
    of = learner()
    for number in (2, 4, 10, 12):
        checkpoint.save(tmp_path / f"step-{number:06d}", of, State(number, CONTROLLER), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000012"]
    (tmp_path / ".step-000014.99.tmp").mkdir()
    (tmp_path / "step-000016").mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000012"


def test_saving_again_replaces(tmp_path: Path) -> None:
    of = learner()
    for beta in (0.1, 0.2):
        state = State(3, Controllers.of(Fixed(beta)))
        checkpoint.save(tmp_path / "step-000003", of, state, keep=2)
    assert checkpoint.load(tmp_path / "step-000003", of).controller.mean_beta == 0.2


def test_a_failure_to_write_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = learner()
    checkpoint.save(tmp_path / "step-000001", of, State(1, CONTROLLER), keep=1)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match=r"step-000002: the checkpoint cannot be written: No space .* -> free"):
        checkpoint.save(tmp_path / "step-000002", of, State(2, CONTROLLER), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def torn(folder: Path) -> None:
    path = folder / "state.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def absent(folder: Path) -> None:
    (folder / "state.safetensors").unlink()


def no_json(folder: Path) -> None:
    (folder / "state.json").write_text("{")


def other_controller(folder: Path) -> None:
    record = json.loads((folder / "state.json").read_text())
    record["controller"]["colour"] = 1
    (folder / "state.json").write_text(json.dumps(record))


@pytest.mark.parametrize("damage", [torn, absent, no_json, other_controller])
def test_a_damaged_one_is_named(damage, tmp_path: Path) -> None:
    folder = tmp_path / "step-000001"
    checkpoint.save(folder, learner(), State(1, CONTROLLER), keep=1)
    damage(folder)
    with pytest.raises(InputError, match=r"step-000001: the checkpoint cannot be used: .* -> remove this folder"):
        checkpoint.load(folder, learner())


def test_one_of_another_critic_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "step-000001"
    checkpoint.save(folder, learner(), State(1, CONTROLLER), keep=1)
    with pytest.raises(InputError, match="cannot be used"):
        checkpoint.load(folder, learner(scalar=True))


def test_a_reference_that_moved_comes_back_too(tmp_path: Path) -> None:
    """It is an earlier policy: neither the supervised one nor that of the checkpoint."""
    of, other = learner(seed=1), learner(seed=5)
    moving, fresh = (replace(learner(), reference=one.policy) for one in (of, other))
    step(moving)
    checkpoint.save(tmp_path / "step-000001", moving, State(1, CONTROLLER), keep=2)
    assert not same(weights_of(fresh.reference), weights_of(moving.reference))
    checkpoint.load(tmp_path / "step-000001", fresh)
    assert same(weights_of(fresh.reference), weights_of(moving.reference))
    assert not same(weights_of(fresh.reference), weights_of(fresh.policy))


def test_what_the_guard_did_comes_back(tmp_path: Path) -> None:
    done = Watched(branch=2, alarms={"beta": 1}, acted=3, stopped="because")
    checkpoint.save(tmp_path / "step-000001", learner(), State(1, CONTROLLER, guard=done), keep=2)
    assert checkpoint.load(tmp_path / "step-000001", learner()).guard == done
    checkpoint.rewrite(tmp_path / "step-000001", guard={"branch": 3})
    found = checkpoint.load(tmp_path / "step-000001", learner())
    assert found.guard == Watched(branch=3) and found.controller == CONTROLLER
