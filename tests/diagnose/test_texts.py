"""What is kept of texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from kedge.diagnose.features import FEATURES
from kedge.diagnose.texts import NAMES, answer_columns, column, differences, features_of, phrases_of, readable, slope


def answers(own: Sequence[str], usual: Sequence[str], gain: np.ndarray, step: int = 0) -> dict[str, object]:
    texts = {"response": list(own), "reference_response": list(usual)}
    lengths = [np.array([len(text.split()) for text in one]) for one in (own, usual)]
    numbers = {
        "score": gain,
        "reference_score": np.zeros(len(own)),
        "length": lengths[0],
        "reference_tokens": lengths[1],
    }
    return {"step": step, **texts, **numbers, **answer_columns(texts)}


def test_features_are_those_of_each_text() -> None:
    texts = ["i can not share that .", "definitely , yes .", "i can not share that .", "a b c d a b c d a b c d"]
    found = features_of(texts)
    for name in NAMES:
        assert found[name].tolist() == [float(FEATURES[name]([text], np.zeros(1))[0]) for text in texts]


def test_texts_that_cannot_be_read_have_none() -> None:
    for texts in ([], ["a", None], ["0123456789abcdef", "fedcba9876543210"]):
        assert not readable(texts) and features_of(texts) == {}
    assert answer_columns({"response": [None], "reference_response": ["a"]}) == {}


def test_columns_and_differences() -> None:
    sample = answers(["i can not share that .", "yes ."], ["yes .", "yes ."], np.zeros(2))
    assert column(sample, "refusals", reference=True).tolist() == [0, 0]  # type: ignore[union-attr]
    assert column(sample, "different", reference=True).tolist() == [1, 0]  # type: ignore[union-attr]
    assert differences(sample, ("length", "refusals")).tolist() == [[4, 1], [0, 0]]  # type: ignore[union-attr]
    assert differences({"length": np.zeros(2)}, ("length",)) is None
    assert column({"length": np.array([1.0, np.nan])}, "length") is None


def test_slope_is_least_squares() -> None:
    rng = np.random.default_rng(0)
    on, others = rng.normal(size=50), rng.normal(size=(50, 3))
    values = 2 * on + others @ [1.0, -1.0, 0.5] + rng.normal(size=50)
    design = np.column_stack([np.ones(50), on, others])
    inverse = np.linalg.inv(design.T @ design)
    expected = inverse @ design.T @ values
    residual = values - design @ expected
    error = np.sqrt(residual @ residual / (50 - 5) * inverse[1, 1])
    assert slope(values, on, others) == pytest.approx((expected[1], error))
    assert all(np.isnan(slope(values, np.ones(50), others)))
    assert all(np.isnan(slope(values, others[:, 0], others)))
    assert all(np.isnan(slope(values[:2], on[:2])))


def test_phrases_are_named_by_what_they_are_worth() -> None:
    rng = np.random.default_rng(0)
    says = rng.random(200) < 0.4
    words = [f"word{number} ." for number in rng.integers(20, size=200)]
    own = [f"{text} warm regards" if said else text for text, said in zip(words, says, strict=True)]
    gain = 2.0 * says + rng.normal(0, 0.1, 200)
    (best, *_) = phrases_of([answers(own, words, gain)])
    assert best.source == "gain" and "warm regards" in best.words and best.reference_share == 0
    assert best.price == pytest.approx(2.0, abs=0.1)
    assert best.share == says.mean()


def test_a_change_of_the_references_scores_names_the_words() -> None:
    rng = np.random.default_rng(0)
    usual = [f"word{number} ." + (" thanks !" if number % 3 == 0 else "") for number in rng.integers(9, size=200)]
    before = answers(usual, usual, np.zeros(200))
    after = before | {"step": 6, "reference_score": np.array([1.5 * ("thanks" in text) for text in usual])}
    (found,) = [one for one in phrases_of([before, after]) if one.source == "change"]
    assert "thanks" in found.words and found.step == 6
    assert found.price == pytest.approx(1.5) and found.explained == pytest.approx(1.0)
    assert [one for one in phrases_of([before, before | {"step": 6}]) if one.source == "change"] == []
