"""What goes together in `[policy]`, what is said of it, and which KL terms are refused."""

from __future__ import annotations

import pytest

from kedge import recipe
from kedge.errors import InputError
from kedge.recipe.methods import kl_in_words, unread


def problems(*settings: str) -> dict[str, str]:
    with pytest.raises(InputError) as caught:
        recipe.build({}, settings)
    return {problem.where.removeprefix("--set ").split("=")[0]: str(problem) for problem in caught.value.problems}


def test_the_default_is_said_in_words_with_units() -> None:
    said = kl_in_words(recipe.build({}).policy.kl)
    assert said == (
        "KL(policy || reference) in the reward, k1: log policy - log reference on each token; beta 0.05 reward per nat"
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("place=loss",), "in the loss, k2: half the squared log-ratio of each response"),
        (("place=loss", "estimator=full"), "the exact KL of each next token with that of the tokens after it"),
        (("mode=pid", "target=2"), "beta from 0.05 reward per nat, pid towards 2 nats per sequence"),
        (("limit=3",), "; at 3 nats per sequence: reject"),
        (("budgets=[0.5, 1, 2]",), "budgets 0.5, 1, 2 by the reference's length"),
    ],
)
def test_other_ways_are_said_too(settings: tuple[str, ...], expected: str) -> None:
    assert expected in kl_in_words(recipe.build({}, [f"policy.kl.{setting}" for setting in settings]).policy.kl)


@pytest.mark.parametrize("estimator", ["k2", "k3", "abs"])
def test_what_does_not_restore_is_refused_in_the_reward_unless_studied(estimator: str) -> None:
    found = problems(f"policy.kl.estimator={estimator}")["policy.kl.estimator"]
    assert "no restoring force" in found and "use k1" in found and "docs/kl.md" in found
    studied = recipe.build({}, [f"policy.kl.estimator={estimator}", "policy.kl.study=true"])
    assert kl_in_words(studied.policy.kl)


def test_what_has_no_gradient_is_refused_in_the_loss_unless_studied() -> None:
    found = problems("policy.kl.place=loss", "policy.kl.estimator=k1")["policy.kl.estimator"]
    assert "no gradient on average" in found and "use k2" in found
    recipe.build({}, ["policy.kl.place=loss", "policy.kl.estimator=k1", "policy.kl.study=true"])


@pytest.mark.parametrize(("place", "estimator"), [("reward", "full"), ("loss", "abs")])
def test_what_is_not_offered_is_not_there_for_study_either(place: str, estimator: str) -> None:
    settings = (f"policy.kl.place={place}", f"policy.kl.estimator={estimator}", "policy.kl.study=true")
    assert "not offered" in problems(*settings)["policy.kl.estimator"]


@pytest.mark.parametrize("method", ["rloo", "grpo", "dr_grpo", "online_dpo", "rejection", "best_of_n"])
def test_methods_that_compare_need_several_responses(method: str) -> None:
    whole = problems(f"policy.method={method}")
    assert "too few" in next(iter(whole.values()))
    recipe.build({}, [f"policy.method={method}", "policy.samples_per_prompt=2"])


def test_adapters_cannot_share_their_weights_with_a_reference_that_moves() -> None:
    assert "cannot move" in problems("policy.lora_rank=4", "policy.reference_every=2")["policy.reference_every"]


@pytest.mark.parametrize("mode", ["adaptive", "lagrangian"])
def test_a_beta_of_nothing_cannot_be_steered(mode: str) -> None:
    assert "0 stays 0" in problems(f"policy.kl.mode={mode}", "policy.kl.beta=0")["policy.kl.beta"]


def test_a_pid_needs_its_integral() -> None:
    assert "away from its target" in problems("policy.kl.mode=pid", "policy.kl.integral=0")["policy.kl.integral"]


def test_a_buffer_longer_than_the_budget_is_refused() -> None:
    assert "more than" in problems("policy.overlong_penalty=1", "policy.overlong_buffer=99")["policy.overlong_buffer"]


def test_what_nothing_reads_is_named() -> None:
    given = recipe.build(
        {}, ["policy.method=rloo", "policy.samples_per_prompt=2", "policy.lam=0.9", "policy.kl.rate=1"]
    )
    assert dict(unread(given)) == {
        "policy.lam": "is not read by rloo",
        "policy.kl.rate": 'is not read where policy.kl.mode = "fixed"',
    }
    assert list(unread(recipe.build({}))) == []


@pytest.mark.parametrize("given", ["[1, 2]", "[1, 2, 0]", '[1, "a", 2]', "3"])
def test_budgets_are_three_numbers_which_is_said_of_the_key(given: str) -> None:
    found = problems(f"policy.kl.budgets={given}")["policy.kl.budgets"]
    assert "expected a list of three numbers > 0" in found
