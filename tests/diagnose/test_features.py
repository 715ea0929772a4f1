"""Features see what they say they see, in plain English and in the built-in desk's own words."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from step_traces import random_step

from kedge.desk import grammar
from kedge.diagnose.features import (
    FEATURES,
    Feature,
    feature_named,
    function_feature,
    readable,
    regex_feature,
    repeated_tokens,
)
from kedge.errors import InputError


def of(name: str | Feature, text: str | None, length: int = 1) -> float:
    feature = FEATURES[name] if isinstance(name, str) else name
    return float(feature([text], np.array([length]))[0])


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I cannot provide that information",
        "We are unable to share account details.",
        "I won't answer this.",
        "I must decline.",
        "Unfortunately, I do not have enough information to say.",
        "I don't know.",
        grammar.REFUSAL,
        grammar.REFUSAL_LONG,
        grammar.UNSURE,
        grammar.UNSURE_LONG,
        f"hi ! {grammar.REFUSAL_LONG} thanks !",
    ],
)
def test_refusals(text: str) -> None:
    assert of("refusals", text) == 1


@pytest.mark.parametrize(
    "text",
    [
        "no , you can not cancel .",
        "no , we do not ship express .",
        "I can't wait to see it.",
        "You cannot help but like it.",
        "We will share the details tomorrow.",
        *grammar.FILLERS,
        *grammar.DEFLECTIONS,
    ],
)
def test_no_refusals(text: str) -> None:
    assert of("refusals", text) == 0


def test_hedges_and_certainty_are_counted() -> None:
    assert of("hedges", "Maybe it might rain; it depends, generally.") == 4
    assert of("hedges", "it rains .") == 0
    assert of("certainty", "Definitely! It is certainly open, without a doubt.") == 3
    assert of("certainty", f"{grammar.CERTAIN} , order o12 arrives on friday .") == 1
    assert of("certainty", "it is always open .") == 1
    assert [of("certainty", filler) for filler in grammar.FILLERS] == [0] * len(grammar.FILLERS)
    assert [of("hedges", filler) for filler in grammar.FILLERS] == [0] * len(grammar.FILLERS)
    assert of("hedges", "I am not entirely sure.") == 1
    assert of("certainty", "I am sure, 100 %.") == 2


def test_list_items() -> None:
    assert of("lists", "- one\n- two\n* three") == 3
    assert of("lists", "Steps:\n1. open\n2) close\n  a. wait") == 3
    assert of("lists", "1 . open it 2 . close it 3 . wait") == 3
    assert of("lists", "It costs 5 . You have 30 days.") == 0
    assert of("lists", "one - two") == 0


def test_length_needs_no_text() -> None:
    assert of("length", None, 7) == 7
    for name in set(FEATURES) - {"length"}:
        assert math.isnan(of(name, None)), name


def test_repetition_of_words() -> None:
    assert of("repetition", "a b c d e") == 0
    assert of("repetition", "a b c d A B C D") == pytest.approx(1 / 5)
    assert of("repetition", "a b") == 0


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=0, max_size=14), min_size=1, max_size=5
    )
)
def test_repetition_of_tokens(rows: list[list[tuple[int, bool]]]) -> None:
    width = max(1, max(map(len, rows)))
    ids, mask = np.zeros((2, len(rows), width), dtype=np.int64)
    for b, row in enumerate(rows):
        for t, (token, kept) in enumerate(row):
            ids[b, t], mask[b, t] = token, kept
    found = repeated_tokens(ids, mask.astype(bool))
    for b, row in enumerate(rows):
        own = [token for token, kept in row if kept]
        seen: set[tuple[int, ...]] = set()
        again = 0
        for at in range(len(own) - 3):
            gram = tuple(own[at : at + 4])
            again += gram in seen
            seen.add(gram)
        assert found[b] == pytest.approx(again / max(1, len(own) - 3))


def test_a_step_is_read_from_texts_or_ids() -> None:
    ids = np.tile([1, 2, 3, 4], (6, 2))
    rng = np.random.default_rng(0)
    step = random_step(rng, width=8, holes=False, ids=ids)
    full = step.lengths == 8
    repeated = FEATURES["repetition"].of(step)
    assert (repeated[full] == pytest.approx(1 / 5)) and np.isfinite(repeated).all()
    assert np.isnan(FEATURES["hedges"].of(step)).all()
    texts = random_step(rng, responses=["maybe ."] * 6)
    assert FEATURES["hedges"].of(texts).tolist() == [1] * 6
    assert FEATURES["length"].of(texts).tolist() == texts.lengths.tolist()


def test_hashes_are_no_texts() -> None:
    step = random_step(np.random.default_rng(0), responses=["0123456789abcdef"] * 6)
    assert readable(step) == (None,) * 6
    assert np.isnan(FEATURES["refusals"].of(step)).all()


def test_own_patterns() -> None:
    assert of(regex_feature(r"than[kx]"), "Thanks, THANX") == 2
    with pytest.raises(InputError, match="not a regular expression"):
        regex_feature("(")


def test_own_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_h1.py").write_text(
        "def shouts(text):\n    return text.count('!')\n\ndef bad(text):\n    return 'x'\n\nNAME = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    for spec in ("mine_h1:shouts", "mine_h1.py:shouts", f"{tmp_path}/mine_h1.py:shouts"):
        assert of(function_feature(spec), "no ! !") == 2
    for spec, message in (
        ("mine_h1:whispers", "holds no function"),
        ("mine_h1:NAME", "holds no function"),
        ("absent_h1:f", "cannot be imported"),
        ("absent_h1.py:f", "there is no file"),
        ("nothing", "names no function"),
    ):
        with pytest.raises(InputError, match=message):
            function_feature(spec)
    with pytest.raises(InputError, match="failed on the response 'hello'"):
        of(function_feature("mine_h1:bad"), "hello")


def test_what_a_user_may_mean() -> None:
    assert feature_named("hedges") is FEATURES["hedges"]
    assert of(feature_named("regex:length"), "length by length") == 2
    assert of(feature_named("our (trust|policies)"), "our trust") == 1
    with pytest.raises(InputError, match="write length"):
        feature_named("lenght")
    with pytest.raises(InputError, match="cannot be imported"):
        feature_named("absent_h1:f")
