"""The comparison with another library's PPO: Kedge's side trains, both sides' figures are what they say."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kedge.rollout.engine import TorchEngine
from kedge.rollout.given import as_prompts
from kedge.rollout.reward import scores
from kedge.rollout.score import score_rollouts
from kedge.structs import Sampling

ROOT = Path(__file__).resolve().parents[1]
RAW = ROOT / "docs" / "results" / "trl-ppo.json"
MODULES = ("task", "measure", "kedge_side", "page")


@pytest.fixture(scope="module")
def side() -> Iterator[dict[str, Any]]:
    folder = str(ROOT / "benchmarks" / "trl_ppo")
    sys.path.insert(0, folder)
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(folder)
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def task(side: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("trl-ppo")
    sizes = {"hidden": 16, "layers": 1, "heads": 2, "vocabulary": 48, "prompts": 24, "sentences": 64}
    lengths = {"steps": 3, "batch": 16, "epochs": 2, "minibatches": 2, "budget": 8}
    training = {"sft_steps": 3, "reward_steps": 3, "reward_samples": 64}
    side["task"].prepare(folder, side["task"].Numbers(**sizes, **lengths, **training))
    return folder


@pytest.mark.parametrize("variant", ["scalar", "channels", "own"])
def test_kedges_side_trains(side: dict[str, Any], task: Path, variant: str, tmp_path: Path) -> None:
    rows = list(side["kedge_side"].curve(task, side["kedge_side"].VARIANTS[variant], 0, tmp_path / "policy"))
    assert len(rows) == 3 and (tmp_path / "policy" / "model.safetensors").exists()
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[2]["kl"] != pytest.approx(0, abs=1e-5)
    assert all(np.isfinite(list(row.values())).all() for row in rows)


def test_the_figures_are_those_of_the_package(side: dict[str, Any], task: Path) -> None:
    from kedge.models.load import load_classifier, load_policy, scratch_policy
    from kedge.models.reward import reward_model

    policy, tokenizer = load_policy(task / "policy")
    judge = load_classifier(task / "reward")
    reference = scratch_policy(tokenizer, family="llama", hidden=16, layers=1, heads=2, context=64, seed=5)
    eos, pad = side["task"].EOS, side["task"].PAD
    prompts = as_prompts(side["task"].load_prompts(task), pad)
    drawn = TorchEngine(eos, pad).generate(policy, prompts, Sampling(8), torch.Generator().manual_seed(0))
    assert drawn.ended.any() and not drawn.ended.all()
    found = side["measure"].figures(policy, reference, judge, drawn.prompt_ids, drawn.response_ids)
    rewarders = {"score": lambda rollouts: scores(reward_model([judge]), rollouts)}
    scored = score_rollouts(drawn, policy, reference, None, rewarders, temperature=1.0, eos_id=eos)
    mask = drawn.response_mask
    kl = (scored.old.logprobs - scored.reference.logprobs).sum(dim=1).mean()
    assert found["score"] == pytest.approx(float(scored.scores["score"].mean()), rel=1e-4)
    assert found["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert found["entropy"] == pytest.approx(float(scored.old.entropy[mask].mean()), rel=1e-4)
    assert found["length"] == pytest.approx(float(drawn.lengths.float().mean()))
    assert found["ended"] == pytest.approx(float(drawn.ended.float().mean()))
    assert found["padding_said"] == int(((drawn.response_ids == pad) & mask).sum())


def curves_of(shift: float) -> dict[str, Any]:
    random = np.random.default_rng(0)
    names = ("score", "kl", "length", "entropy")

    def side(by: float) -> dict[str, Any]:
        return {name: (random.normal(size=(8, 41)) + by).tolist() for name in names}

    return {"curves": {"a": side(0.0), "b": side(shift)}, "seeds": 8, "numbers": {"steps": 41}}


def test_sides_that_differ_by_chance_agree_and_others_do_not(side: dict[str, Any]) -> None:
    assert side["page"].compared(curves_of(0.0), "a", "b").agrees
    apart = side["page"].compared(curves_of(-2.0), "a", "b")
    assert not apart.agrees and len(apart.told_apart) == 20
    point = apart.points[0]
    a, b = (np.array(curves_of(-2.0)["curves"][name]["score"])[:, 1:9].mean(axis=1) for name in "ab")
    assert point.difference == pytest.approx(a.mean() - b.mean())
    assert point.error == pytest.approx(np.sqrt(a.var(ddof=1) / 8 + b.var(ddof=1) / 8))
    assert point.in_spreads == pytest.approx((a.mean() - b.mean()) / np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2))


def test_the_page_and_its_drawing_come_from_the_figures_beside_them(side: dict[str, Any]) -> None:
    text, drawing = side["page"].page(json.loads(RAW.read_text(encoding="utf-8")))
    assert text == RAW.with_suffix(".md").read_text(encoding="utf-8")
    assert drawing == RAW.with_suffix(".svg").read_text(encoding="utf-8")
