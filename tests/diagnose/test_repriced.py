"""Fixed texts whose scores change."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "checks"))
from made_views import PROBES, Story, plain

from kedge.diagnose.repriced import repricings


def changed(pay, **more: object) -> Story:  # type: ignore[no-untyped-def]
    return Story(pay=lambda step: pay if step > 20 else plain, **more)  # type: ignore[arg-type]


def test_the_same_scores_are_no_change() -> None:
    assert repricings(Story().view()) == ()


def test_a_price_of_length_is_found_exactly_in_both_sources() -> None:
    found = repricings(changed(lambda text: plain(text) + 0.05 * (len(text.split()) + 1)).view())
    assert {one.source for one in found} == {"the probe answers", "the reference's answers"}
    for one in found:
        assert (one.before, one.step) == (20, 25) and not one.rescaled
        assert one.prices["length"].value == pytest.approx(0.05, abs=1e-9)
        assert one.explained == pytest.approx(1.0)
        assert all(price.value == pytest.approx(0, abs=1e-6) for name, price in one.prices.items() if name != "length")


def test_another_scale_and_offset_is_told_apart() -> None:
    for scale, offset in ((5.0, 0.0), (1.0, 2.0), (0.2, -1.0)):
        found = repricings(changed(lambda text, s=scale, o=offset: s * plain(text) + o).view())
        answers = [one for one in found if one.source != "the probe answers"]  # probe scores have noise of their own
        assert answers and all(one.rescaled for one in answers)


def test_texts_that_kept_their_score_are_counted() -> None:
    found = repricings(changed(lambda text: plain(text) + 2.0 * ("refund" in text)).view())
    for one in found:
        assert 0.5 < one.untouched < 0.95 and one.moved == pytest.approx(2.0)


def test_shares_explained_are_those_of_nested_regressions() -> None:
    """The share of a feature is the loss of R squared when it is left out."""
    view = changed(lambda text: plain(text) + 0.05 * len(text.split()) + 1.0 * ("definitely" in text)).view()
    one = next(each for each in repricings(view) if each.source == "the probe answers")
    new = view.probes[-1]
    change = new.score - view.probes[0].score
    columns = {"length": new.length, **new.features}

    def determined(names: list[str]) -> float:
        design = np.column_stack([np.ones(len(change)), *(columns[name] for name in names)])
        fitted = design @ np.linalg.lstsq(design, change, rcond=None)[0]
        return 1 - float(((change - fitted) ** 2).sum() / ((change - change.mean()) ** 2).sum())

    for name, price in one.prices.items():
        rest = determined([other for other in columns if other != name])
        assert price.explained == pytest.approx(determined(list(columns)) - rest, abs=1e-9)


def test_other_texts_are_not_compared() -> None:
    view = changed(lambda text: plain(text) + 1.0 * ("refund" in text)).view()
    moved = tuple(replace(one, length=one.length + one.step) for one in view.probes)
    shifted = tuple(one | {"reference_tokens": one["reference_tokens"] + one["step"]} for one in view.samples)
    assert repricings(replace(view, probes=moved, samples=shifted)) == ()


def test_few_texts_are_not_judged() -> None:
    view = changed(lambda text: plain(text) + 1.0 * ("refund" in text)).view()
    few = tuple(
        replace(
            one,
            **{name: getattr(one, name)[:9] for name in ("probe", "variant", "length", "score", "kl", "tercile")},
            response=one.response[:9],
            features={name: values[:9] for name, values in one.features.items()},
        )
        for one in view.probes
    )
    assert PROBES * 3 > 30 and repricings(replace(view, probes=few, samples=())) == ()
