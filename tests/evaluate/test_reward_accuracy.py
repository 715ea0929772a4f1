"""Agreement with people, length-balanced and not, and what calibrated judges show, on data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_data import numbers, table
from scipy.stats import binomtest

from kedge.data.records import Preference, Ranking, Rating, Verdict
from kedge.evaluate.intervals import MIN_PROMPTS, clustered, mean_over_prompts, ratio
from kedge.evaluate.reward.accuracy import Agreement, agreements
from kedge.evaluate.reward.answers import Judged, NotChecked, judged, lengths
from kedge.evaluate.reward.calibration import Calibration, calibration


def part(found: object) -> Agreement:
    assert isinstance(found, Agreement)
    return found


# From rows to comparisons


def test_each_kind_becomes_comparisons() -> None:
    pair = judged([Preference("p", "good", "bad", strength=0.25)])
    assert [pair.answers[at][1] for at in (*pair.first, *pair.second)] == ["bad", "good"]  # more votes for `rejected`
    assert pair.share.tolist() == [0.75]
    ranking = judged([Ranking("p", ("a", "b", "c"), (0, 0, 1))])
    assert ranking.share.tolist() == [0.5, 1.0, 1.0]
    assert ranking.decided.tolist() == [False, True, True]
    ratings = judged([Rating("p", "a", 1.0), Rating("p", "a", 2.0), Rating("p", "b", 5.0), Rating("q", "c", 9.0)])
    assert ratings.grade.tolist() == [1.5, 5.0, 9.0]
    assert [ratings.answers[at][1] for at in (*ratings.first, *ratings.second)] == ["b", "a"]
    assert not ratings.verdicts
    verdicts = judged([Verdict("p", "a", True), Verdict("p", "b", False), Verdict("p", "b", True)])
    assert verdicts.verdicts and verdicts.grade.tolist() == [1.0, 0.5]


def test_ties_and_identical_texts_decide_nothing() -> None:
    found = judged([Preference("p", "a", "b", 0.5), Preference("p", "a", "a"), Preference("p", "a", "b")])
    assert found.decided.tolist() == [False, False, True]
    assert len(found.answers) == 2


def test_one_prompt_with_very_many_ratings_stays_small() -> None:
    found = judged([Rating("p", f"answer {number}", float(number)) for number in range(300)])
    assert len(found.first) == 40 * 39 / 2


# Accuracy


def by_hand(found: Judged, scores: np.ndarray) -> float:
    hits = []
    for first, second, share in zip(found.first, found.second, found.share, strict=True):
        if share > 0.5 and first != second:
            hits.append(1.0 if scores[first] > scores[second] else 0.5 if scores[first] == scores[second] else 0.0)
    return float(np.mean(hits))


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_is_the_share_of_agreement(seed: int) -> None:
    found = table(seed, 40, 3)
    scores = np.round(numbers(found.answers, seed))  # rounded, so that some are equal
    agreed = agreements(found, scores)
    assert part(agreed["all"]).accuracy.value == pytest.approx(by_hand(found, scores))
    assert part(agreed["all"]).longer.value == pytest.approx(by_hand(found, found.characters))
    lead = part(agreed["all"]).lead.value
    assert lead == pytest.approx(by_hand(found, scores) - by_hand(found, found.characters))


@pytest.mark.parametrize("longer_wins", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("power", [1, -1])
def test_length_alone_is_worth_one_half_on_the_balanced_part(longer_wins: float, power: int) -> None:
    found = table(1, 300, 2, longer_wins=longer_wins)
    agreed = agreements(found, power * found.characters**0.5)
    balanced = part(agreed["length_balanced"])
    assert balanced.accuracy.value == pytest.approx(0.5, abs=1e-12)
    assert (balanced.accuracy.low, balanced.accuracy.high) == pytest.approx((0.5, 0.5))
    assert balanced.weight < balanced.pairs
    won = np.mean(np.sign(found.characters[found.first] - found.characters[found.second]))
    assert part(agreed["all"]).accuracy.value == pytest.approx(0.5 + power * won / 2)
    assert part(agreed["longer_is_worse"]).accuracy.value == (0.0 if power == 1 else 1.0)


def test_balanced_accuracy_is_that_of_balanced_samples() -> None:
    """By drawing them: within fifths of the length ratio as many pairs of the larger side as there are of the other."""
    found = table(2, 250, 2, longer_wins=0.7)
    scores = 0.02 * found.characters + numbers(found.answers, 5)
    size = np.log(found.characters[found.first] / found.characters[found.second])
    hit = scores[found.first] > scores[found.second]
    edges = np.quantile(np.abs(size[size != 0]), [0.2, 0.4, 0.6, 0.8])
    rng, drawn = np.random.default_rng(0), []
    for _ in range(300):
        kept = [hit[size == 0]]
        for stratum in range(5):
            inside = (np.searchsorted(edges, np.abs(size)) == stratum) & (size != 0)
            sides = [np.flatnonzero(inside & (np.sign(size) == sign)) for sign in (1, -1)]
            few = min(map(len, sides))
            kept += [hit[rng.permutation(side)[:few]] for side in sides]
        drawn.append(np.concatenate(kept).mean())
    expected = part(agreements(found, scores)["length_balanced"]).accuracy.value
    assert expected == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 300**0.5)


def test_a_judge_of_quality_stays_right_on_every_part() -> None:
    found = table(3, 200, longer_wins=0.8)
    scores = np.zeros(len(found.answers))
    scores[found.first] = 1.0
    for name, agreed in agreements(found, scores).items():
        if name != "similar_length":
            assert part(agreed).accuracy.value == 1.0
            assert part(agreed).accuracy.low is not None and part(agreed).accuracy.low > 0.9
    assert part(agreements(found, scores)["all"]).lead.above(0)


def test_too_few_comparisons_are_said_to_be() -> None:
    found = agreements(table(0, 12), np.zeros(24))
    assert found["all"] == NotChecked("12 decided comparisons, 30 are needed")
    assert all(isinstance(one, NotChecked) for one in found.values())
    assert all(isinstance(one, NotChecked) for one in agreements(judged([]), np.zeros(0)).values())


def test_few_prompts_have_no_interval() -> None:
    found = part(agreements(table(0, MIN_PROMPTS - 1, 20), np.zeros(2 * 20 * (MIN_PROMPTS - 1)))["all"])
    assert found.accuracy.value == 0.5
    assert found.accuracy.low is found.accuracy.high is None


# Intervals


@given(st.integers(0, 2**32 - 1))
def test_a_ratio_of_sums_is_what_a_loop_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompt, hit = rng.integers(0, 15, size=60), rng.integers(0, 2, size=60).astype(float)
    found = clustered(np.stack([hit, np.ones(60)], axis=1), prompt, ratio, draws=50)
    assert found.value == pytest.approx(hit.mean())
    assert found.low is not None and found.high is not None and 0 <= found.low <= found.high <= 1


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Clusters that agree among themselves: an interval that took rows as independent would be far too narrow."""
    rng = np.random.default_rng(0)
    covered = naive = 0
    for _ in range(300):
        prompt = np.repeat(np.arange(60), 8)
        hit = (rng.random(480) < np.repeat(rng.beta(1.2, 0.8, size=60), 8)).astype(float)  # 0.6 in the mean
        found = clustered(np.stack([hit, np.ones(480)], axis=1), prompt, ratio, draws=400)
        assert found.low is not None and found.high is not None
        covered += found.low <= 0.6 <= found.high
        interval = binomtest(int(hit.sum()), 480).proportion_ci(0.95, method="wilson")
        naive += interval.low <= 0.6 <= interval.high
    assert 0.91 <= covered / 300 <= 0.98
    assert naive / 300 < 0.8


def test_a_mean_over_prompts_is_students() -> None:
    from scipy.stats import ttest_1samp

    rng = np.random.default_rng(0)
    prompt, values = np.repeat(np.arange(20), 3), rng.normal(0.3, 1, size=60)
    means = values.reshape(20, 3).mean(axis=1)
    found, p = mean_over_prompts(values, prompt)
    expected = ttest_1samp(means, 0)
    assert (found.value, p) == pytest.approx((means.mean(), expected.pvalue))
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert mean_over_prompts(np.zeros(60), prompt)[1] == 1.0
    assert mean_over_prompts(np.ones(60), prompt)[1] == 0.0


# Calibration


def voted(seed: int, count: int, believed: float = 1.0) -> tuple[Judged, np.ndarray]:
    """Comparisons drawn from the probabilities of known scores, and `believed` times these scores."""
    rng = np.random.default_rng(seed)
    scores = {f"{side} {number}": rng.normal() for number in range(count) for side in "ab"}
    rows = []
    for number in range(count):
        first, second = f"a {number}", f"b {number}"
        if rng.random() > 1 / (1 + np.exp(-(scores[first] - scores[second]))):
            first, second = second, first
        rows.append(Preference(f"question {number}", first, second))
    found = judged(rows)
    return found, believed * np.array([scores[text] for _, text in found.answers])


def calibrated(found: Judged, scores: np.ndarray) -> Calibration:
    measured = calibration(found, scores, 1.0)
    assert isinstance(measured, Calibration)
    return measured


def test_a_calibrated_judge_is_within_chance() -> None:
    measured = [calibrated(*voted(seed, 600)) for seed in range(40)]
    assert np.mean([one.ece > one.ece_by_chance for one in measured]) <= 0.15  # 5% by definition
    assert np.mean([one.sharpness for one in measured]) == pytest.approx(1, abs=0.05)
    assert calibrated(*voted(0, 20_000)).ece < 0.02


@pytest.mark.parametrize("believed", [3.0, 0.3])
def test_a_judge_that_is_too_sure_or_not_sure_enough_is_found(believed: float) -> None:
    measured = calibrated(*voted(1, 2000, believed))
    assert measured.ece > 2 * measured.ece_by_chance
    assert measured.sharpness == pytest.approx(1 / believed, rel=0.15)
    assert (measured.confidence > measured.accuracy) == (believed > 1)


def test_calibration_by_hand() -> None:
    """Two bins of 25: one always says 0.5 + a, the other 0.5 + b."""
    margin = np.repeat([0.4, 2.0], 25)
    right = np.array([True] * 15 + [False] * 10 + [True] * 20 + [False] * 5)
    rows = [Preference(f"p{at}", f"w{at}", f"l{at}") for at in range(50)]
    found = judged(rows)
    scores = np.zeros(100)
    scores[found.first] = np.where(right, margin, -margin)
    sure = 1 / (1 + np.exp(-np.array([0.4, 2.0])))
    measured = calibrated(found, scores)
    assert measured.ece == pytest.approx((abs(sure[0] - 15 / 25) + abs(sure[1] - 20 / 25)) / 2)
    brier = [(1 - sure[0]) ** 2 * 15, sure[0] ** 2 * 10, (1 - sure[1]) ** 2 * 20, sure[1] ** 2 * 5]
    assert measured.brier == pytest.approx(sum(brier) / 50)
    assert [one.pairs for one in measured.bins] == [25, 25]
    assert [one.observed for one in measured.bins] == pytest.approx([0.6, 0.8])


def test_votes_count_as_shares() -> None:
    """A judge that says 0.75 of pairs that got three votes in four is right."""
    found = judged([Preference(f"p{at}", f"w{at}", f"l{at}", 0.75) for at in range(60)])
    scores = np.zeros(120)
    scores[found.first] = np.log(3)
    measured = calibrated(found, scores)
    assert (measured.ece, measured.brier, measured.brier_of_coin) == pytest.approx((0, 0, 1 / 16), abs=1e-12)


def test_calibration_that_cannot_be_had_says_why() -> None:
    found = table(0, 20)
    assert calibration(found, lengths(found.answers), None) == NotChecked(
        "this judge's scores are not meant as probabilities"
    )
    assert calibration(found, lengths(found.answers), 1.0) == NotChecked("20 decided comparisons, 50 are needed")


def test_a_judge_that_never_tells_two_apart_is_a_coin() -> None:
    measured = calibrated(table(0, 60), np.zeros(120))
    assert (measured.ece, measured.brier, measured.sharpness) == (0.0, 0.25, 0.0)
