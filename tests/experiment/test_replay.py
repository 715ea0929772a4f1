"""Replay against what training computed, against training's own function, against loops, and against autograd."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from kedge import pipeline
from kedge import recipe as recipes
from kedge.errors import InputError
from kedge.experiment.replay import plan_of, refusal, replayed, replayed_steps
from kedge.experiment.replay.effects import _by_position, _inside, returned
from kedge.experiment.replay.setting import Betas
from kedge.ops.kl import ESTIMATORS
from kedge.ops.losses import ppo_objective, token_weights
from kedge.progress import Interrupt, Progress
from kedge.structs import Experience, ScoredRollouts
from kedge.trace.reader import Run, StepTrace, read_run
from kedge.train import policy as loop
from kedge.train.experience import make_experience
from kedge.train.methods import METHODS
from kedge.train.update import KL_LOSSES

RECIPE = """
name = "tiny"
threads = 1
[desk]
demonstrations = 200
[desk.annotators]
length = 0.13
[model]
hidden = 16
layers = 1
heads = 2
context = 80
[sft]
steps = 11
batch_size = 16
warmup = 2
[pairs]
prompts = 60
[reward]
epochs = 1
batch_size = 16
[policy]
steps = 3
prompts_per_step = 8
max_new_tokens = 12
missing_eos_penalty = 0.5
lr = 3e-3
[evaluate]
prompts = 16
every = 100
[trace]
probes = 8
probes_every = 100
[checkpoint]
every = 100
"""
GROUPED = ("policy.samples_per_prompt=4", "policy.prompts_per_step=3")
VARIANTS: dict[str, tuple[str, ...]] = {
    "ppo": ("policy.score_clip=1.0", "policy.overlong_penalty=0.3"),
    "scalar": ("policy.critic=scalar", "policy.entropy_bonus=0.05", "policy.kl.mode=adaptive", "policy.kl.target=0.1"),
    "grpo": ("policy.method=grpo", *GROUPED, "policy.kl.place=loss", "policy.dual_clip=3.0"),
    "reinforce_pp": (
        *("policy.method=reinforce_pp", "policy.kl.place=loss"),
        *("policy.importance_cap=2.0", "policy.clip_high=0.3"),
    ),
}
Told = tuple[ScoredRollouts, dict[str, Any], Experience]


def carried_out(out: Path, stages: tuple[str, ...], settings: tuple[str, ...] = (), start: Path | None = None) -> Path:
    pipeline.run(
        recipes.parse(RECIPE, settings),
        out,
        recipe_text=RECIPE,
        stages=stages,
        resume=False,
        progress=Progress(quiet=True),
        interrupt=Interrupt(),
        start=start,
    )
    return out


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return carried_out(tmp_path_factory.mktemp("start") / "run", ("sft", "reward"))


@pytest.fixture(scope="module")
def runs(start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Run, list[Told]]]:
    """Each variant's run, and what training gave `make_experience` and got at each step."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, settings in VARIANTS.items():
            told: list[Told] = []
            patch.setattr(loop, "experience_of", _spied(told))
            out = carried_out(tmp_path_factory.mktemp(name) / "run", ("policy",), settings, start)
            found[name] = (read_run(out), told[-3:])  # the first step is computed twice where a critic is calibrated
    return found


def _spied(told: list[Told]) -> Any:
    def experience_of(scored: ScoredRollouts, beta: torch.Tensor, settings: Any) -> Experience:
        in_loss = settings.update.kl_loss is not None
        options = {
            "weights": {**settings.weights, "kl": torch.zeros_like(beta) if in_loss else -beta},
            "gamma": settings.gamma,
            "lam": settings.lam,
            "whiten": settings.whiten,
            "method": settings.method,
            "kl_estimator": settings.kl_estimator,
            "loss_beta": beta if in_loss else 0.0,
        }
        experience = make_experience(scored, **options)
        told.append((scored, options, experience))
        return experience

    return experience_of


@pytest.mark.parametrize("name", VARIANTS)
def test_its_own_settings_give_the_logged_advantage(name: str, runs: dict[str, tuple[Run, list[Told]]]) -> None:
    run, told = runs[name]
    for one, (_, _, experience) in zip(replayed_steps(run, plan_of(run.settings)), told, strict=True):
        width = one.changed.response_mask.shape[1]
        expected = experience.advantage().numpy()[:, :width]
        assert_allclose(one.changed.advantage(), expected, atol=2e-6 * np.abs(expected).max())
        assert_allclose(one.changed.advantage(), one.logged.advantage(), atol=1e-6)
        assert_allclose(one.changed.shift, one.logged.shift, atol=1e-6)
        assert_allclose(one.changed.scale, one.logged.scale, rtol=1e-6)
        assert_allclose(one.changed.loss_beta, one.logged.loss_beta, rtol=1e-6)
        assert (one.changed_push.active == one.logged.active).all()
        one.changed.check_digest()


CHANGES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "beta": ("ppo", ("policy.kl.beta=0.7",), {"weights": {"kl": -0.7}}),
    "length": ("ppo", ("policy.length_penalty=0.04",), {"weights": {"length": -0.04}}),
    "no penalty for truncation": ("ppo", ("policy.missing_eos_penalty=0.0",), {"weights": {"missing_eos": -0.0}}),
    "lambda and gamma": ("ppo", ("policy.lam=1.0", "policy.gamma=0.9"), {"lam": 1.0, "gamma": 0.9}),
    "no whitening": ("ppo", ("policy.whiten=false",), {"whiten": False}),
    "no overlong penalty": ("ppo", ("policy.overlong_penalty=0.0",), {"weights": {"overlong": 0.0}}),
    "k3": ("ppo", ("policy.kl.estimator=k3", "policy.kl.study=true"), {"kl_estimator": ESTIMATORS["k3"]}),
    "reinforce": ("ppo", ("policy.method=reinforce",), {"method": METHODS["reinforce"]}),
    "a2c": ("ppo", ("policy.method=a2c",), {"method": METHODS["a2c"]}),
    "kl in the loss": ("ppo", ("policy.kl.place=loss",), {"weights": {"kl": 0.0}, "loss_beta": 0.05}),
    "scalar, beta": (
        "scalar",
        ("policy.kl.mode=fixed", "policy.kl.beta=0.3", "policy.lam=1.0"),
        {"weights": {"kl": -0.3}, "lam": 1.0},
    ),
    "rloo": ("grpo", ("policy.method=rloo",), {"method": METHODS["rloo"]}),
    "dr_grpo": (
        "grpo",
        ("policy.method=dr_grpo", "policy.kl.beta=0.4"),
        {"method": METHODS["dr_grpo"], "loss_beta": 0.4},
    ),
    "kl in the reward": ("grpo", ("policy.kl.place=reward",), {"weights": {"kl": -0.05}, "loss_beta": 0.0}),
    "reinforce_pp": ("reinforce_pp", ("policy.length_penalty=0.1",), {"weights": {"length": -0.1}}),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_changed_it_is_what_training_would_have_computed(case: str, runs: dict[str, tuple[Run, list[Told]]]) -> None:
    """`make_experience` on the rollouts that training had in memory, told the change by hand."""
    name, changes, options = CHANGES[case]
    run, told = runs[name]
    for one, (scored, logged, _) in zip(replayed_steps(run, plan_of(run.settings, changes)), told, strict=True):
        weights = {**logged["weights"], **options.get("weights", {})}
        given = {**logged, **options, "weights": weights}
        if not isinstance(given["loss_beta"], torch.Tensor):
            given["loss_beta"] = torch.full((len(scored.rollouts),), float(given["loss_beta"]), dtype=torch.float64)
        if METHODS[run.settings["policy"]["method"]].baseline is None and given["method"].baseline is not None:
            scored = replace(scored, values=None)
        if given["method"] is METHODS["a2c"]:
            assert given["whiten"]
        expected = make_experience(scored, **given)
        width = one.changed.response_mask.shape[1]
        wanted = expected.advantage().numpy()[:, :width]
        assert np.abs(wanted).max() > 0.1
        assert_allclose(one.changed.advantage(), wanted, atol=1e-5 * np.abs(wanted).max())
        assert_allclose(one.changed.loss_beta, expected.loss_beta.numpy(), rtol=1e-5)


def looped_advantage(step: StepTrace, weights: dict[str, float], *, gamma: float, lam: float, whiten: bool) -> Any:
    """[B, T] in float64, token by token, from the columns of a trace."""
    count, length = step.response_mask.shape
    raw = np.zeros((count, length))
    for row in range(count):
        places = [t for t in range(length) if step.response_mask[row, t]]
        for channel, name in enumerate(step.channels):
            running, following = 0.0, 0.0
            for t in reversed(places):
                value = float(step.values[row, t, channel])
                running = float(step.rewards[row, t, channel]) + gamma * following - value + gamma * lam * running
                following = value
                raw[row, t] += weights.get(name, float(step.weights[row, channel])) * running
    tokens = [raw[row, t] for row in range(count) for t in range(length) if step.response_mask[row, t]]
    if not whiten:
        return raw
    mean = sum(tokens) / len(tokens)
    deviation = math.sqrt(sum((one - mean) ** 2 for one in tokens) / len(tokens) + 1e-8)
    return np.where(step.response_mask, (raw - mean) / deviation, 0)


@pytest.mark.parametrize("name", ["ppo", "scalar"])
def test_changed_it_is_what_loops_in_float64_give(name: str, runs: dict[str, tuple[Run, list[Told]]]) -> None:
    run, _ = runs[name]
    changes = ("policy.kl.mode=fixed", "policy.kl.beta=0.4", "policy.length_penalty=0.05", "policy.lam=0.9")
    for whiten in (True, False):
        plan = plan_of(run.settings, (*changes, f"policy.whiten={str(whiten).lower()}"))
        for one in replayed_steps(run, plan):
            weights = {"kl": -0.4, "length": -0.05}
            wanted = looped_advantage(one.logged, weights, gamma=1.0, lam=0.9, whiten=whiten)
            assert_allclose(one.changed.advantage(), wanted, atol=2e-5)


def test_a_lower_score_clip_holds_the_score(runs: dict[str, tuple[Run, list[Told]]]) -> None:
    run, told = runs["ppo"]
    plan = plan_of(run.settings, ("policy.score_clip=0.2",))
    for one, (scored, _, _) in zip(replayed_steps(run, plan), told, strict=True):
        at = one.changed.channels.index("score")
        found = one.changed.rewards[..., at].sum(axis=1)
        assert_allclose(found, scored.scores["score"].numpy().clip(-0.2, 0.2), atol=1e-6)


def test_the_score_without_length_has_no_slope_on_it(runs: dict[str, tuple[Run, list[Told]]]) -> None:
    run, _ = runs["ppo"]
    products = 0.0
    for one in replayed_steps(run, plan_of(run.settings, ("score=residual_length",))):
        at = one.changed.channels.index("score")
        lengths = one.logged.lengths - one.logged.lengths.mean()
        products += float(lengths @ one.changed.rewards[..., at].sum(axis=1))
    assert products == pytest.approx(0, abs=1e-4)


def test_the_head_of_a_score_without_length_follows(runs: dict[str, tuple[Run, list[Told]]]) -> None:
    """V' = V - slope (tokens so far + length head - usual): with a perfect length head the change leaves no advantage
    but that of the score; at lambda 1 the advantage changes by -slope (length - what was expected of it)."""
    run, _ = runs["ppo"]
    plan = plan_of(run.settings, ("score=residual_length", "policy.lam=1.0", "policy.whiten=false"))
    plain = plan_of(run.settings, ("policy.lam=1.0", "policy.whiten=false"))
    pairs = list(zip(replayed_steps(run, plan), replayed_steps(run, plain), strict=True))
    products, squares = 0.0, 0.0
    for _, other in pairs:
        inside = other.logged.lengths - other.logged.lengths.mean()
        score = other.logged.rewards[..., other.logged.channels.index("score")].sum(axis=1)
        products, squares = products + inside @ score, squares + inside @ inside
    slope = products / squares
    for one, other in pairs:
        step = one.logged
        head = step.values[..., step.channels.index("length")]
        for row in range(len(step)):
            for t in range(step.lengths[row]):
                expected = -slope * (step.lengths[row] - (t + head[row, t]))
                gap = one.changed.advantage()[row, t] - other.changed.advantage()[row, t]
                assert gap == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("epoch", ["first", "last"])
def test_the_push_is_the_gradient_of_the_loss(name: str, epoch: str, runs: dict[str, tuple[Run, list[Told]]]) -> None:
    """Autograd through the objective and the KL term as the update builds them, in float64."""
    run, _ = runs[name]
    policy = run.settings["policy"]
    for one in replayed_steps(run, plan_of(run.settings)):
        step, mask = one.logged, torch.from_numpy(one.logged.response_mask)
        old, new, usual, sampled = (
            torch.from_numpy(step.tokens[f"{which}_logprob"]).double()
            for which in ("old", "new", "reference", "behaviour")
        )
        logprobs = (old if epoch == "first" else new).clone().requires_grad_()
        objective, _ = ppo_objective(
            logprobs,
            old,
            torch.from_numpy(step.advantage()),
            clip=policy["clip"],
            clip_high=policy["clip_high"],
            dual_clip=policy["dual_clip"],
        )
        if policy["importance_cap"]:
            objective = objective * torch.exp(old - sampled).clamp(max=policy["importance_cap"])
        aggregation = policy["aggregation"] or METHODS[policy["method"]].aggregation
        weights = token_weights(
            mask, aggregation, tokens=mask.sum(), responses=len(step), budget=policy["max_new_tokens"]
        )
        total = (objective * weights).sum()
        if policy["kl"]["place"] == "loss":
            each = KL_LOSSES["k2"](logprobs, usual, mask)
            total = total - (each * torch.from_numpy(step.loss_beta) * weights.amax(dim=1)).sum()
        (wanted,) = torch.autograd.grad(total, logprobs)
        if policy["entropy_bonus"]:
            at = old if epoch == "first" else new
            surprise = at + torch.from_numpy(step.tokens["entropy"]).double()
            wanted = wanted - policy["entropy_bonus"] * surprise * weights
        found = getattr(one.logged_push, epoch)
        scale = float(wanted.abs().max())
        assert_allclose(found, (wanted * mask).numpy(), atol=1e-5 * scale)


@pytest.mark.parametrize("estimator", ["k1", "k3", "full"])
def test_a_kl_moved_into_the_loss_pushes_as_its_gradient_does(
    estimator: str, runs: dict[str, tuple[Run, list[Told]]]
) -> None:
    run, _ = runs["ppo"]
    changes = ("policy.kl.place=loss", f"policy.kl.estimator={estimator}", "policy.kl.beta=2.0", "policy.kl.study=true")
    for one in replayed_steps(run, plan_of(run.settings, changes)):
        step, mask = one.logged, torch.from_numpy(one.logged.response_mask)
        old = torch.from_numpy(step.tokens["old_logprob"]).double().requires_grad_()
        usual = torch.from_numpy(step.tokens["reference_logprob"]).double()
        if estimator == "full":  # on sampled tokens: sum_t sg(sum_{s >= t} k1_s) log pi_t
            gaps = ((old - usual) * mask).detach()
            onward = gaps.flip(1).cumsum(1).flip(1)
            each = (onward * old * mask).sum(dim=1)
        else:
            each = KL_LOSSES[estimator](old, usual, mask)
        term = (each * torch.from_numpy(one.changed.loss_beta)).sum() / mask.sum()
        (gradient,) = torch.autograd.grad(term, old)
        wanted = one.changed.advantage() / float(mask.sum()) - (gradient * mask).numpy()
        assert_allclose(one.changed_push.first, wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_clip_changes_what_the_last_epoch_lets_through(runs: dict[str, tuple[Run, list[Told]]]) -> None:
    run, _ = runs["ppo"]
    found = replayed(run, ("policy.clip=0.001",))
    assert found.active[1] < found.active[0]
    assert found.push_mean["all"][0] == pytest.approx(found.push_mean["all"][1])
    assert found.effects["length"].predictor == "push"


def test_a_steered_beta_follows_the_logged_divergence(runs: dict[str, tuple[Run, list[Told]]]) -> None:
    """Told its own settings again, the controller gives the coefficients that training had."""
    run, told = runs["scalar"]
    plan = plan_of(run.settings, ("policy.kl.mode=adaptive", "policy.kl.target=0.1"))
    for one, (_, options, _) in zip(replayed_steps(run, plan), told, strict=True):
        wanted = -options["weights"]["kl"].numpy()
        assert_allclose(one.changed_setting.beta, wanted, rtol=1e-6)
        assert_allclose(one.changed.weights[:, one.changed.channels.index("kl")], -wanted, rtol=1e-6)


def test_its_own_reward_model_gives_the_logged_score(start: Path, runs: dict[str, tuple[Run, list[Told]]]) -> None:
    run, _ = runs["reinforce_pp"]
    plan = plan_of(run.settings, reward=start / "models/reward")
    for one in replayed_steps(run, plan):
        at = one.logged.channels.index("score")
        assert_allclose(one.changed.rewards[..., at], one.logged.rewards[..., at], atol=1e-4)


def test_a_rule_is_asked_again(runs: dict[str, tuple[Run, list[Told]]]) -> None:
    run, _ = runs["reinforce_pp"]
    changes = ("rewards.says.kind=regex", "rewards.says.pattern=[aeiou]", "rewards.says.weight=-0.5")
    for one in replayed_steps(run, plan_of(run.settings, changes)):
        at = one.changed.channels.index("says")
        found = one.changed.rewards[..., at].sum(axis=1)
        assert_allclose(found, [any(letter in text for letter in "aeiou") for text in one.logged.responses])
        assert (one.changed.weights[:, at] == -0.5).all()


def test_the_whole_is_reported(runs: dict[str, tuple[Run, list[Told]]]) -> None:
    run, _ = runs["ppo"]
    found = replayed(run, ("policy.length_penalty=5.0",))
    effect = found.effects["length"]
    assert effect.predictor == "return" and effect.decided[1].value < effect.decided[0].value
    assert effect.decided[1].value < 0 and effect.expected[1] < 0 and effect.difference.value < 0
    assert found.steps == (0, 1, 2) and found.responses == 24
    assert found.flips["all"].responses == 24
    assert sum(found.flips[style].responses for style in ("concise", "between", "verbose")) == 24
    assert sum(before for before, _ in found.shares.values()) == pytest.approx(1)
    assert sum(after for _, after in found.shares.values()) == pytest.approx(1)
    assert 0 < found.effective[1] <= 1
    logged, changed = found.margin
    assert logged is not None and changed is not None
    assert changed.net == pytest.approx(logged.net - 5.0 * logged.length)
    assert any("one step only" in one.text for one in found.validity)
    assert any("better" in one.text and one.kind == "unknown" for one in found.validity)
    assert any(line.startswith("under the change") for line in found.lines())
    assert replayed(run, ("policy.length_penalty=5.0",), first=1, last=1).steps == (1,)


def test_one_step_alone_can_be_replayed(runs: dict[str, tuple[Run, list[Told]]]) -> None:
    run, _ = runs["ppo"]
    step = run.step(1)
    assert replayed(step, ("policy.kl.beta=1.0",)).steps == (1,)
    assert replayed(step).effects["length"].ratio == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("policy.kl.bta=1", "did you mean policy.kl.beta"),
        ("kl.beta=1.0", "did you mean policy.kl.beta"),
        ("policy.lr=1.0", "how far a step goes"),
        ("policy.steps=9", "how far a step goes"),
        ("policy.temperature=0.5", "what was drawn"),
        ("policy.critic=scalar", "critic"),
        ("policy.method=rloo", "drew one for each"),
        ("policy.method=dpo", "no advantages"),
        ("policy.target_penalty=0.1", "reference's own answer"),
        ("policy.score_normalisation=running", "scores that the trace does not hold"),
        ("reward.epochs=2", "--reward"),
        ("seed=2", "before the policy stage"),
        ("evaluate.every=2", "no part"),
        ("score=residual", "did you mean score=residual_length"),
        ("policy.kl.beta=-1", "not allowed"),
    ],
)  # fmt: skip
def test_what_cannot_be_known_is_refused_with_the_reason(
    change: str, says: str, runs: dict[str, tuple[Run, list[Told]]]
) -> None:
    with pytest.raises(InputError, match=says.replace("(", r"\(")):
        replayed(runs["ppo"][0], (change,))


def test_a_critic_cannot_be_made_up(runs: dict[str, tuple[Run, list[Told]]]) -> None:
    with pytest.raises(InputError, match="had no critic"):
        replayed(runs["grpo"][0], ("policy.method=ppo",))


def test_every_key_can_be_replayed_or_says_why_not() -> None:
    known = recipes.keys()
    for key in known:
        reason = refusal(key.replace("NAME", "polite"))
        assert reason is None or len(reason.split()) > 3, key
        assert reason != "is not in the trace", f"{key} has no reason of its own"


def test_the_covariance_of_returns_is_that_of_loops(runs: dict[str, tuple[Run, list[Told]]]) -> None:
    for name in ("ppo", "grpo"):
        run, _ = runs[name]
        total, count = 0.0, 0
        for one in replayed_steps(run, plan_of(run.settings)):
            step = one.logged
            gap = step.tokens["old_logprob"].astype(float) - step.tokens["reference_logprob"]
            earned = []
            for row in range(len(step)):
                amount = sum(
                    float(step.weights[row, c]) * float(step.rewards[row, t, c])
                    for c in range(len(step.channels))
                    for t in range(step.lengths[row])
                )
                if name == "grpo":
                    amount -= 0.05 * sum(gap[row, t] for t in range(step.lengths[row]))
                earned.append(amount)
            members = (
                [np.flatnonzero(step.group == g) for g in np.unique(step.group)]
                if name == "grpo"
                else [np.arange(len(step))]
            )
            for rows in members:
                pay, size = np.array(earned)[rows], step.lengths[rows].astype(float)
                total += len(rows) * float(np.cov(pay, size)[0, 1])
            count += len(step)
        assert replayed(run).effects["length"].returns[0].value == pytest.approx(total / count, rel=1e-4)


@given(st.integers(0, 10**6), st.floats(-5, 5), st.floats(0.1, 9))
def test_a_level_that_a_position_shares_moves_nothing(seed: int, level: float, size: float) -> None:
    rng = np.random.default_rng(seed)
    mask = np.arange(6) < rng.integers(1, 7, 12)[:, None]
    weights, feature = rng.normal(size=mask.shape), rng.normal(size=12)
    inside, _ = _inside(feature, np.arange(12))
    plain = _by_position(weights, inside, mask)
    shifted = _by_position(weights + level * np.arange(6), inside, mask)
    assert_allclose(shifted, plain, atol=1e-9)
    assert_allclose(_by_position(size * weights, inside, mask), size * plain, atol=1e-9)
    assert_allclose(_by_position(weights, inside + 3, mask), plain, atol=1e-9)


@given(st.integers(0, 10**6))
def test_the_push_covariance_is_the_slope_of_the_mean(seed: int) -> None:
    """Weigh each response by exp(eta x sum of its tokens' weights, less the mean of the position): the derivative of
    the weighted mean of a feature at eta = 0, by differences."""
    rng = np.random.default_rng(seed)
    count = 15
    mask = np.arange(6) < rng.integers(1, 7, count)[:, None]
    weights, feature = rng.normal(size=mask.shape), rng.normal(size=count)
    level = [weights[mask[:, t], t].mean() if mask[:, t].any() else 0.0 for t in range(6)]
    tilt = np.array([sum(weights[row, t] - level[t] for t in range(6) if mask[row, t]) for row in range(count)])

    def mean(eta: float) -> float:
        return float(np.average(feature, weights=np.exp(eta * tilt)))

    slope = (mean(1e-5) - mean(-1e-5)) / 2e-5
    inside, _ = _inside(feature, np.arange(count))
    assert _by_position(weights, inside, mask).mean() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_the_return_covariance_is_the_slope_of_the_mean() -> None:
    """Price: tilting whole responses by exp(eta x return) moves the mean of a feature by eta x their covariance."""
    rng = np.random.default_rng(0)
    pay, feature, chance = rng.normal(size=6), rng.normal(size=6), rng.integers(1, 5, 6)

    def mean(eta: float) -> float:
        return float(np.average(feature, weights=chance * np.exp(eta * pay)))

    rows = np.repeat(np.arange(6), chance)
    alone = np.arange(len(rows))
    products = _inside(pay[rows], alone)[0] * _inside(feature[rows], alone)[0]
    assert products.mean() == pytest.approx((mean(1e-5) - mean(-1e-5)) / 2e-5, rel=1e-6)


def test_a_discount_counts_in_the_return(runs: dict[str, tuple[Run, list[Told]]]) -> None:
    run, _ = runs["ppo"]
    for one in replayed_steps(run, plan_of(run.settings, ("policy.gamma=0.5",))):
        step = one.changed
        weighted = (step.weights[:, None, :] * step.rewards).sum(axis=-1)
        wanted = [sum(0.5**t * weighted[row, t] for t in range(step.lengths[row])) for row in range(len(step))]
        assert_allclose(returned(step, one.changed_setting), wanted, rtol=1e-5)


def test_texts_that_were_not_kept_cannot_be_scored_again(
    start: Path, tmp_path: Path, runs: dict[str, tuple[Run, list[Told]]]
) -> None:
    out = carried_out(tmp_path / "run", ("policy",), ("trace.text=none", "policy.steps=1"), start)
    run = read_run(out)
    assert replayed(run, ("policy.kl.beta=1.0",)).responses == 8
    with pytest.raises(InputError, match="token ids are not kept"):
        replayed(run, reward=start / "models/reward")
    with pytest.raises(InputError, match="needs the texts"):
        replayed(run, ("rewards.says.kind=regex", "rewards.says.pattern=x"))
    with pytest.raises(InputError, match="token ids are not kept"):
        replayed(run, ("policy.repetition_penalty=1.0",))


def test_a_fixed_beta_keeps_the_shares_of_budgets() -> None:
    settings = {"policy": {"kl": {"beta": 0.1, "budgets": [0.5, 1, 2]}}}
    logged = np.array([0.2, 0.1, 0.05])
    assert_allclose(Betas(plan_of(settings, ("policy.kl.beta=0.3",)), None).at(0, logged), 3 * logged)
    assert_allclose(Betas(plan_of(settings, ("policy.lam=1.0",)), None).at(0, logged), logged)
    with pytest.raises(InputError, match="share of beta is not in the trace"):
        nothing = {"policy": {"kl": {"beta": 0.0, "budgets": [0.5, 1, 2]}}}
        Betas(plan_of(nothing, ("policy.kl.beta=0.3",)), None).at(0, logged)
    with pytest.raises(InputError, match="group"):
        plan_of(settings, ("policy.kl.mode=pid",))


def test_a_steered_beta_needs_every_step(runs: dict[str, tuple[Run, list[Told]]]) -> None:
    run, _ = runs["ppo"]
    with pytest.raises(InputError, match="not all are logged"):
        replayed(run.step(0), ("policy.kl.mode=adaptive",))
