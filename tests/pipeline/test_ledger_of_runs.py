"""The ledger of runs that were really trained: every method, KL in the reward and in the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from processes import ran

from kedge.diagnose.groups import by_position
from kedge.diagnose.push import Measure
from kedge.diagnose.split import split
from kedge.diagnose.survey import survey
from kedge.trace.reader import Run, read_run

GROUPED = ("policy.samples_per_prompt=4", "policy.prompts_per_step=4")
LOSS = "policy.kl.place=loss"
VARIANTS: dict[str, tuple[str, ...]] = {
    "ppo": ("policy.entropy_bonus=0.01",),
    "ppo, KL in the loss": (LOSS,),
    "ppo, scalar critic": ("policy.critic=scalar", "policy.kl.estimator=k1"),
    "grpo": ("policy.method=grpo", *GROUPED),
    "grpo, k3 in the loss": ("policy.method=grpo", *GROUPED, LOSS, "policy.kl.estimator=k3"),
    "reinforce_pp": ("policy.method=reinforce_pp",),
    "reinforce_pp, exact KL in the loss": ("policy.method=reinforce_pp", LOSS, "policy.kl.estimator=full"),
}


QUICK = ("ppo", "ppo, KL in the loss", "grpo", "reinforce_pp")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]


@pytest.fixture(scope="module")
def run_of(plain: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The run of a variant, trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("ledgers")

    def run(name: str) -> Run:
        out = folder / str(list(VARIANTS).index(name))
        if not out.exists():
            words = [word for setting in (*VARIANTS[name], "policy.steps=2") for word in ("--set", setting)]
            ran(folder, "policy", plain, "--out", out, "--start", start, *words)
        return read_run(out)

    return run


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_sum_to_what_training_used(run_of: Callable[[str], Run], name: str) -> None:
    length = Measure("length", "tokens", lambda step: step.lengths.astype(float))
    found = survey(run_of(name), [by_position()], [length])
    assert len(found.steps) == 2
    assert found.gap.token < 1e-5 and found.gap.excess < 1e-5 and found.gap.holds
    if name.startswith("ppo"):
        assert found.gap.digest < 1e-5
    account = found.accounts[0]
    parts = sum(sums for entry, sums in account.sums.items() if entry.kind == "part")
    np.testing.assert_allclose(parts, account.advantage, atol=1e-9)
    assert sum(found.pushes[0].shares().values()) == pytest.approx(1)


SHOWN = {
    "ppo": ("loss entropy bonus", "kl entropy side", "kl critic"),
    "ppo, KL in the loss": ("loss KL (k2)",),
    "ppo, scalar critic": ("score critic (estimated)", "critic rest"),
    "grpo": ("kl entropy side", "kl critic"),
    "grpo, k3 in the loss": ("loss KL (k3)",),
    "reinforce_pp": ("kl prior side",),
    "reinforce_pp, exact KL in the loss": ("loss KL (full)",),
}
CENTRED = {"ppo, scalar critic": "scalar", "reinforce_pp": "none", "reinforce_pp, exact KL in the loss": "none"}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_run_shows(run_of: Callable[[str], Run], name: str) -> None:
    run = run_of(name)
    entries = {entry.name for entry in split(run.step(run.steps()[-1])).entries}
    assert set(SHOWN[name]) <= entries
    assert ("kl entropy side" in entries) == ("loss" not in name)
    assert survey(run).centring == CENTRED.get(name, "channels")
