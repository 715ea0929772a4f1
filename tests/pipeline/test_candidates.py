"""The two answers that annotators compare, by each of the three methods, and how far apart they are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kedge import recipe
from kedge.errors import InputError, Interrupted
from kedge.models.load import scratch_policy
from kedge.pipeline import candidates as module
from kedge.pipeline.candidates import best_of_candidates, candidates, diversity, sampled_candidates
from kedge.pipeline.context import Context
from kedge.pipeline.tasks import inputs_of
from kedge.progress import Interrupt, Progress
from kedge.rollout.beam import beam_candidates
from kedge.structs import Rollouts, Sampling
from kedge.trace.run_dir import RunDir
from kedge.train.schedule import seeded

TINY = {
    "desk": {"demonstrations": 40},
    "model": {"hidden": 16, "layers": 1, "heads": 2},
    "policy": {"max_new_tokens": 6},
    "pairs": {"prompts": 12},
}
Made = tuple[Context, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A context on the built-in desk and an untrained policy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kedge.pipeline.tasks.DESK_PROMPTS", 8)
        patch.setattr("kedge.desk.world.HELD_OUT", 4)
        settings = recipe.build(TINY)
        inputs = inputs_of(settings)
    run = RunDir(tmp_path_factory.mktemp("run"))
    context = Context(settings, run, inputs.task, inputs.tokenizer, Progress(quiet=True), Interrupt())
    policy = scratch_policy(inputs.tokenizer, family="llama", hidden=16, layers=1, heads=2, context=96, seed=0)
    return context, policy


def having(made: Made, *settings: str) -> tuple[Context, Any, list[Any]]:
    context, policy = made
    changed = recipe.build(TINY, settings)
    other = Context(changed, context.run, context.task, context.tokenizer, context.progress, Interrupt())
    return other, policy, list(context.task.pair_prompts)


def samples_of(context: Context, policy: Any, texts: list[Any], count: int, index: int) -> list[list[str]]:
    """Prompt by prompt, the samples that the seed gives."""
    prompts = context.encode_prompts(texts)
    repeated = prompts.rows(torch.arange(len(texts)).repeat_interleave(count))
    drawn = context.engine.generate(policy, repeated, Sampling(6), seeded(0, "pairs", index))
    answers = context.text(drawn)
    return [answers[start : start + count] for start in range(0, len(answers), count)]


@pytest.mark.parametrize("count", [2, 3])
def test_samples_are_compared_in_the_order_drawn(made: Made, count: int) -> None:
    context, policy, texts = having(made, f"pairs.candidates={count}")
    found = candidates(context, policy, texts, 1)
    expected = []
    for text, own in zip(texts, samples_of(context, policy, texts, count, 1), strict=True):
        other = next((answer for answer in own if answer != own[0]), None)
        if other is not None:
            expected.append((text, own[0], other))
    assert found == expected
    assert found != candidates(context, policy, texts, 2), "another checkpoint draws other answers"


def test_beams_are_the_likeliest_two_in_either_order(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    context, policy, texts = having(made, "pairs.method=beam", "pairs.candidates=3")
    monkeypatch.setattr(module, "PROMPTS_AT_ONCE", 5)
    found = candidates(context, policy, texts, 0)
    assert [text for text, _, _ in found] == texts
    turned = 0
    for text, first, second in found:
        beams = beam_candidates(policy, context.encode_prompts([text]), Sampling(6), 3, context.eos_id, context.pad_id)
        best = list(dict.fromkeys(context.text(beams)))[:2]
        assert {first, second} == set(best)
        turned += first != best[0]
    assert 0 < turned < len(found), "which one is shown first is left to a coin"
    assert candidates(context, policy, texts, 0) == found


def test_the_best_of_several_meets_another(made: Made) -> None:
    context, policy, texts = having(made, "pairs.method=best_of", "pairs.candidates=5")

    def likes_long(rollouts: Rollouts) -> torch.Tensor:
        return torch.tensor([float(len(text)) for text in context.text(rollouts)])

    found = candidates(context, policy, texts, 0, likes_long)
    assert found == best_of_candidates(context, policy, texts, likes_long, 0)
    assert [text for text, _, _ in found] == texts
    places, first_wins = set(), 0
    for (_, first, second), own in zip(found, samples_of(context, policy, texts, 5, 0), strict=True):
        best = max(own, key=len)
        assert best in (first, second) and first != second
        other = second if best == first else first
        places.add(sorted(set(own), key=len).index(other))
        first_wins += best == first
    assert 0 < first_wins < len(found)
    assert len(places) > 1, "the other one is drawn, not the second best"


def test_prompts_with_one_answer_drop_out(made: Made) -> None:
    context, policy, texts = having(made, "pairs.method=best_of")

    def one_answer(rollouts: Rollouts) -> list[str]:
        return ["same"] * len(rollouts)

    object.__setattr__(context, "text", one_answer)
    assert best_of_candidates(context, policy, texts, lambda r: torch.zeros(len(r)), 0) == []
    assert module.sampled_candidates(context, policy, texts, 0) == []
    assert module.beam_pairs(context, policy, texts, 0) == []


@pytest.mark.parametrize("method", ["sample", "beam", "best_of"])
def test_no_prompts_no_pairs(made: Made, method: str) -> None:
    context, policy, _ = having(made, f"pairs.method={method}")
    assert candidates(context, policy, [], 0) == []


def test_the_best_of_several_is_sampled_plainly_until_there_is_a_judge(made: Made) -> None:
    context, policy, texts = having(made, "pairs.method=best_of")
    assert candidates(context, policy, texts, 0) == sampled_candidates(context, policy, texts, 0) != []


def test_a_search_stops_when_asked(made: Made) -> None:
    context, policy, texts = having(made, "pairs.method=beam")
    context.interrupt.requested = True
    with pytest.raises(Interrupted):
        candidates(context, policy, texts, 0)


def test_a_beam_search_truncates_nothing() -> None:
    with pytest.raises(InputError) as caught:
        recipe.build(TINY, ["pairs.method=beam", "pairs.top_p=0.9"])
    assert "pairs.top_p" in str(caught.value)


# Diversity


def test_diversity_by_hand() -> None:
    pairs = [("p", "a b c", "a b d e"), ("p", "x", "yyyy")]
    found = diversity(pairs, 4)
    assert found == {
        "two_answers": 0.5,
        "log_length_ratio": pytest.approx((math.log(7 / 5) + math.log(4)) / 2),
        "word_distance": pytest.approx(((1 - 2 / 5) + 1) / 2),
    }
    assert diversity([], 7) == {"two_answers": 0.0}
    assert diversity([], 0) == {"two_answers": 0.0}
    assert diversity([("p", "", " ")], 1)["word_distance"] == 0.0


@given(st.lists(st.tuples(st.just("p"), st.text(max_size=20), st.text(max_size=20)), min_size=1, max_size=5))
def test_diversity_does_not_see_the_order(pairs: list[tuple[str, str, str]]) -> None:
    found = diversity(pairs, len(pairs))
    turned = diversity([(text, second, first) for text, first, second in pairs], len(pairs))
    assert found == pytest.approx(turned)
    assert 0 <= found["word_distance"] <= 1
    assert 0 <= found["log_length_ratio"] <= math.log(20)
