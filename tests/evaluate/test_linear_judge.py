"""The linear judge learns words, is scored on prompts it never saw, and finds nothing where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest
from reward_data import pairs, text_of

from kedge.data.records import Preference
from kedge.errors import InputError
from kedge.evaluate.reward import linear
from kedge.evaluate.reward.accuracy import Agreement, agreements
from kedge.evaluate.reward.answers import Judged, judged
from kedge.evaluate.reward.linear import cross_fitted, folds_of


def about_a_word(seed: int, prompts: int) -> Judged:
    """The answer with the word "thanks" in it wins 9 times in 10, whatever its length."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in range(prompts):
        with_it, without = f"thanks {text_of(rng, 12)}", text_of(rng, 13)
        chosen, rejected = (with_it, without) if rng.random() < 0.9 else (without, with_it)
        rows.append(Preference(f"question {prompt}", chosen, rejected))
    return judged(rows)


def accuracy(found: Judged, *, length: bool = True) -> float:
    judge = cross_fitted(found, length=length)
    measured = agreements(found, judge.score(found.answers))["all"]
    assert isinstance(measured, Agreement)
    return measured.accuracy.value


def test_it_learns_a_word() -> None:
    assert accuracy(about_a_word(0, 200)) > 0.8


def test_it_learns_length_only_where_it_may() -> None:
    found = judged(pairs(0, 150, longer_wins=1.0))
    assert accuracy(found) > 0.95
    without = cross_fitted(found, length=False)
    assert without.name == "linear without length"


def test_nothing_is_learnt_from_coin_flips() -> None:
    """Labels drawn by chance: a leak between folds would let it do better than one half."""
    shares = [accuracy(judged(pairs(seed, 120))) for seed in range(4)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)


def test_a_prompt_is_scored_by_a_model_that_never_saw_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = about_a_word(1, 60)
    trained: list[frozenset[int]] = []
    chosen = linear._chosen

    def watched(features: linear._Features, table: Judged, training: np.ndarray) -> linear._Model:
        trained.append(frozenset(table.prompt[training].tolist()))
        return chosen(features, table, training)

    monkeypatch.setattr(linear, "_chosen", watched)
    cross_fitted(found)
    fold = folds_of(found, linear.FOLDS)
    for number, prompts in enumerate(trained):
        assert prompts.isdisjoint(found.prompt[fold == number].tolist())
    assert len(trained) == linear.FOLDS


def test_folds_keep_groups_whole_and_even() -> None:
    rows = pairs(0, 65)
    found = judged(rows, [f"group {int(row.prompt.split()[1]) % 13}" for row in rows])  # type: ignore[union-attr]
    fold = folds_of(found, 5)
    assert all(len(set(fold[found.prompt == number])) == 1 for number in range(13))
    assert sorted(np.bincount(fold[np.unique(found.prompt, return_index=True)[1]])) == [2, 2, 3, 3, 3]
    again = judged(rows[::-1], [f"group {int(row.prompt.split()[1]) % 13}" for row in rows[::-1]])  # type: ignore[union-attr]
    by_prompt = {prompt: number for (prompt, _), number in zip(found.answers, fold, strict=True)}
    assert {p: n for (p, _), n in zip(again.answers, folds_of(again, 5), strict=True)} == by_prompt


def test_the_same_data_give_the_same_scores_and_new_prompts_get_some() -> None:
    found = about_a_word(2, 60)
    first, second = cross_fitted(found), cross_fitted(found)
    assert np.array_equal(first.score(found.answers), second.score(found.answers))
    new = [("another question", "thanks alder"), ("another question", "alder birch"), ("another question", "")]
    scores = first.score(new)
    assert scores[0] > scores[1]
    assert np.isfinite(scores).all()
    assert first.score([]).shape == (0,)


def test_odd_texts_are_scored() -> None:
    odd = ["", " ", "\ud800", "\U0001f600" * 50, "x" * 5000, "- a\n- b\n", "**bold** `code`", "1 2 3"]
    rows = [Preference(f"p{at}", odd[at % len(odd)], f"plain answer {at}") for at in range(60)]
    found = judged(rows)
    assert np.isfinite(cross_fitted(found).score(found.answers)).all()


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="the linear judge needs 10"):
        cross_fitted(judged(pairs(0, 3, 30)))
