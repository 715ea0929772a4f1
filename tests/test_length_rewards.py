"""Settings that pay for length are named at the start, and a recipe without any is quiet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kedge import recipe
from kedge.recipe import Recipe
from kedge.recipe.length_rewards import MEAN_OF_RESPONSE, Notice, length_rewards
from kedge.recipe.methods import GROUPED
from kedge.train.methods import METHODS as TRAINED

ROOT = Path(__file__).parents[1]
SHIPPED = sorted([*(ROOT / "recipes").glob("*.toml"), *(ROOT / "src/kedge/desk").glob("*.toml")])
METHODS = recipe.keys()["policy.method"].allowed.replace('"', "").split(" or ")


def named(*settings: str) -> list[str]:
    """The keys that are named for a recipe with these settings; it must be a recipe that can run."""
    return [notice.key for notice in length_rewards(recipe.parse("", [f"policy.{setting}" for setting in settings]))]


def only(*settings: str) -> Notice:
    (notice,) = length_rewards(recipe.parse("", list(settings)))
    return notice


def test_the_default_recipe_is_quiet() -> None:
    assert length_rewards(Recipe()) == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_are_quiet(path: Path) -> None:
    assert length_rewards(recipe.load(path)) == []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_quiet_by_itself(method: str) -> None:
    """GRPO divides by length; with the KL in the reward, as by default, that moves no optimum."""
    samples = ["policy.samples_per_prompt=4"] if method in GROUPED else []
    assert length_rewards(recipe.parse("", [f"policy.method={method}", *samples])) == []


# One by one


def test_a_discount() -> None:
    notice = only("policy.gamma=0.99")
    assert notice.key == "policy.gamma"
    assert "a score below 0 gains by going on, one above 0 by stopping" in notice.what
    assert notice.remedy == "set it to 1"


GROUPS = ("samples_per_prompt=4",)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("method=ppo", "aggregation=sequence_mean", "kl.place=loss"), "sequence_mean divides"),
        ((*GROUPS, "method=grpo", "kl.place=loss"), "sequence_mean, as grpo has it, divides"),
    ],
)
def test_division_by_length_with_the_kl_in_the_loss(settings: tuple[str, ...], said: str) -> None:
    assert said in only(*(f"policy.{setting}" for setting in settings)).what
    assert named(*settings) == ["policy.aggregation"]


@pytest.mark.parametrize(
    "settings",
    [
        ("method=ppo", "aggregation=sequence_mean"),
        (*GROUPS, "method=grpo"),
        (*GROUPS, "method=grpo", "kl.beta=0"),
        (*GROUPS, "method=grpo", "kl.beta=0", "kl.place=loss"),
        (*GROUPS, "method=grpo", "aggregation=constant", "kl.place=loss"),
        (*GROUPS, "method=dr_grpo", "kl.place=loss"),
        (*GROUPS, "method=rloo", "kl.place=loss"),
    ],
)
def test_no_division_or_no_kl_in_the_loss_is_fine(settings: tuple[str, ...]) -> None:
    assert named(*settings) == []


def test_truncated_responses_that_score_as_complete() -> None:
    notice = only("policy.missing_eos_penalty=0", "policy.max_new_tokens=40")
    assert notice.key == "policy.missing_eos_penalty"
    assert "cut off at 40 tokens score as if it were complete" in notice.what
    assert "policy.missing_eos_penalty" not in named("missing_eos_penalty=0", "overlong_penalty=1")


def test_an_entropy_bonus() -> None:
    assert only("policy.entropy_bonus=0.01").key == "policy.entropy_bonus"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("kl.estimator=abs", "kl.study=true"), "abs in the reward is never below 0"),
        (("kl.place=loss", "kl.estimator=k3", "kl.study=true"), "going on costs nothing of the KL that follows"),
    ],
)
def test_estimators_that_cost_or_forget_by_the_token(settings: tuple[str, ...], said: str) -> None:
    notice = only(*(f"policy.{setting}" for setting in settings))
    assert notice.key == "policy.kl.estimator"
    assert said in notice.what


@pytest.mark.parametrize(
    "settings",
    [
        ("kl.estimator=k1",),
        ("kl.estimator=k2", "kl.study=true"),
        ("kl.estimator=k3", "kl.study=true"),
        ("kl.place=loss",),
        ("kl.place=loss", "kl.estimator=full"),
        ("kl.beta=0",),
    ],
)
def test_estimators_that_are_right_or_wrong_otherwise_are_quiet(settings: tuple[str, ...]) -> None:
    assert named(*settings) == []


@pytest.mark.parametrize(
    ("settings", "key", "said"),
    [
        (("length_penalty=0.02", "max_new_tokens=50"), "length_penalty", "0.02 per token, as meant: 50 tokens pay 1"),
        (("target_penalty=0.05",), "target_penalty", "0.05 per token beyond the reference's answer, as meant"),
        (("overlong_penalty=2", "overlong_buffer=10"), "overlong_penalty", "0.2 per token over the last 10"),
    ],
)
def test_penalties_that_are_meant_are_named_with_their_size(settings: tuple[str, ...], key: str, said: str) -> None:
    notice = only(*(f"policy.{setting}" for setting in settings))
    assert notice.key == f"policy.{key}"
    assert said in notice.what


@pytest.mark.parametrize(("method", "share", "keys"), [
    ("residual", 1.5, ["reward.length_share"]),
    ("padded_residual", 1.5, ["reward.length_share"]),
    ("residual", 1.0, []),
    ("residual", 0.5, []),
    ("keep", 1.5, []),
])  # fmt: skip
def test_a_residual_that_takes_off_more_than_there_is(method: str, share: float, keys: list[str]) -> None:
    given = recipe.parse("", [f"reward.length={method}", f"reward.length_share={share}"])
    assert [notice.key for notice in length_rewards(given)] == keys


def test_repetition_is_no_length_reward() -> None:
    assert named("repetition_penalty=1") == []


# Together


def test_all_at_once_in_the_order_of_the_recipe() -> None:
    settings = ("gamma=0.9", "aggregation=sequence_mean", "kl.place=loss", "entropy_bonus=0.1", "length_penalty=0.1")
    found = named(*settings, "missing_eos_penalty=0")
    assert found == [
        "policy.gamma",
        "policy.aggregation",
        "policy.entropy_bonus",
        "policy.missing_eos_penalty",
        "policy.length_penalty",
    ]


def test_a_method_that_is_not_paid_has_no_reward_to_name() -> None:
    residual = ["reward.length=residual", "reward.length_share=2"]
    assert length_rewards(recipe.parse("", [*residual, "policy.method=dpo"])) == []
    best_of_n = ["policy.method=best_of_n", "policy.samples_per_prompt=4"]
    assert len(length_rewards(recipe.parse("", [*residual, *best_of_n]))) == 1


def test_a_notice_reads_as_a_line() -> None:
    assert str(Notice("a.b", "0 is free", "set it to 1")) == "a.b: 0 is free -> set it to 1"


def test_the_methods_are_those_that_are_trained() -> None:
    assert set(MEAN_OF_RESPONSE) == {name for name, method in TRAINED.items() if method.aggregation == "sequence_mean"}


def test_recipes_are_read_without_a_training_stack() -> None:
    program = "import sys; sys.modules['torch'] = None; import kedge.recipe.length_rewards"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
