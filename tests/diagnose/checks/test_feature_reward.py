"""Payment for a feature of form, and refusals as what becomes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_views import REFUSAL, Said, Story, plain

from kedge.diagnose.checks.feature_reward import CHECK
from kedge.diagnose.checks.refusals import CHECK as REFUSALS
from kedge.diagnose.view import View, load, save


def liking(bonus: float, what: str = REFUSAL):
    return lambda text: plain(text) + bonus * (what in text)


def refusing(**more: object) -> Story:
    """Refusals pay from the start, and spread."""
    said = lambda step: Said(refuse=0.15 + 0.015 * step)  # noqa: E731
    return Story(pay=lambda step: liking(2.0), said=said, **more)  # type: ignore[arg-type]


def test_a_healthy_run_is_quiet() -> None:
    for seed in range(4):
        view = Story(seed=seed).view()
        assert CHECK(view).strength < 0.5 and REFUSALS(view).strength < 0.5


def test_a_feature_that_pays_and_spreads_is_named() -> None:
    view = refusing().view()
    found = CHECK(view)
    assert found.status == "fail" and "refusals" in found.summary
    assert found.onset is not None and 10 <= found.onset <= 30
    price = next(one.value for one in found.evidence if one.name.startswith("price"))
    assert 1.0 < price < 3.0  # 2, but for what refusals score otherwise, and what KL takes
    assert REFUSALS(view).status == "fail"


@pytest.mark.parametrize(("bonus", "least"), [(2.0, 3.0), (0.7, 1.0)])
def test_payment_that_begins_is_found_before_the_policy_moves(bonus: float, least: float) -> None:
    story = Story(pay=lambda step: liking(bonus) if step > 20 else plain)
    found = CHECK(story.view())
    assert found.status == "fail" and found.strength >= least and found.onset == 25
    assert "refusals" in found.summary and REFUSALS(story.view()).status == "ok"


def test_certainty_is_told_from_refusals() -> None:
    found = CHECK(Story(pay=lambda step: liking(2.0, "definitely") if step > 20 else plain).view())
    assert found.status == "fail" and "certainty" in found.summary


def test_length_is_not_a_feature_of_form() -> None:
    found = CHECK(Story(pay=lambda step: (lambda t: plain(t) + 0.1 * len(t.split())) if step > 20 else plain).view())
    assert found.strength < 0.5


def test_a_right_feature_that_grows_a_little_is_no_fault() -> None:
    said = lambda step: Said(refuse=0.15 + 0.002 * step)  # noqa: E731
    view = Story(pay=lambda step: liking(1.0), said=said).view()
    assert CHECK(view).status == "ok" and REFUSALS(view).status == "ok"


def test_a_feature_that_grows_unpaid_is_no_cause() -> None:
    view = replace(refusing(), pay=lambda step: liking(-0.5)).view()
    assert CHECK(view).status == "ok" and REFUSALS(view).status == "fail"


def test_it_works_on_a_view_read_without_texts(tmp_path) -> None:  # type: ignore[no-untyped-def]
    view = refusing().view()
    save(view, tmp_path / "view.gz")
    again = load(tmp_path / "view.gz").without_settings()
    assert CHECK(again).strength == pytest.approx(CHECK(view).strength, rel=1e-5)
    assert (CHECK(again).onset, CHECK(again).summary) == (CHECK(view).onset, CHECK(view).summary)
    assert REFUSALS(again).strength == pytest.approx(REFUSALS(view).strength, rel=1e-6)


def test_without_texts_it_says_so() -> None:
    for view in (View(name="", facts={}, metrics={}), replace(refusing(), texts=False).view()):
        for check in (CHECK, REFUSALS):
            found = check(view)
            assert found.status == "not_checked" and "texts" in found.summary
