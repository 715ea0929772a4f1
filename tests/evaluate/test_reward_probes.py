"""Slope per unit of length, padding, styles and grades, on judges whose truth is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from reward_data import blind, numbers, table
from scipy.stats import spearmanr

from kedge.data.records import Preference, Rating, Verdict
from kedge.errors import InputError
from kedge.evaluate.reward.answers import LENGTH, Answer, NotChecked, Reading, RewardJudge, judged
from kedge.evaluate.reward.grades import Graded, auc, graded_apart
from kedge.evaluate.reward.grid import GridRow, Grids, evaluate_grid, load_grid
from kedge.evaluate.reward.length import LengthUse, Slope, length_use, slope_within
from kedge.evaluate.reward.measure import Distance, Ensemble, measure
from kedge.evaluate.reward.padding import NEUTRAL, Padding, padding_probe, sentences_of


def used(found: object) -> LengthUse:
    assert isinstance(found, LengthUse)
    return found


# Length


def test_slope_is_that_of_a_regression_with_prompt_effects() -> None:
    import statsmodels.api as sm

    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(25), 4)
    lengths = rng.integers(5, 60, size=100).astype(float)
    scores = 0.05 * lengths + rng.normal(size=25)[prompt] + rng.normal(size=100)
    dummies = (prompt[:, None] == np.arange(25)).astype(float)
    fit = sm.OLS(scores, np.column_stack([lengths, dummies])).fit(
        cov_type="cluster", cov_kwds={"groups": prompt, "use_correction": False, "df_correction": True}, use_t=True
    )
    found = slope_within(scores, lengths, prompt)
    assert found.low is not None and found.high is not None
    error = fit.bse[0] * math.sqrt(25 / 24)
    from scipy.stats import t

    assert found.value == pytest.approx(fit.params[0])
    assert (found.high - found.low) / 2 == pytest.approx(t.ppf(0.975, 24) * error)


def test_a_known_slope_is_recovered() -> None:
    covered = 0
    for seed in range(60):
        found = table(seed, 40, 2)
        scores = 0.03 * found.characters + numbers(found.answers, seed) + 7 * found.prompt
        slope = used(length_use(found, scores, None)).character.per_unit
        assert slope.low is not None and slope.high is not None
        covered += slope.low <= 0.03 <= slope.high
    assert covered >= 52  # 57 expected


def test_what_a_judge_pays_for_length() -> None:
    found = table(1, 60, 2, longer_wins=0.7)
    scores = 0.5 * found.characters
    tokens = np.ceil(found.characters / 4)
    measured = used(length_use(found, scores, tokens))
    assert measured.correlation == pytest.approx(1)
    assert measured.character.per_unit.value == pytest.approx(0.5)
    assert isinstance(measured.token, Slope) and measured.token.per_unit.value == pytest.approx(2, rel=0.02)
    median = np.median(found.characters)
    assert measured.character.half_more == pytest.approx(0.25 * median / measured.spread)
    assert measured.prefers_longer.value == 1.0
    more = found.characters[found.first] - found.characters[found.second]
    assert measured.people_prefer_longer.value == pytest.approx(np.mean(more[more != 0] > 0))


def test_length_that_cannot_be_measured_says_why() -> None:
    few = table(0, 5)
    assert length_use(few, few.characters, None) == NotChecked("5 prompts with two or more answers, 10 are needed")
    equal = judged([Preference(f"p{at}", "ab", "ba") for at in range(20)])
    assert length_use(equal, np.ones(40), None) == NotChecked("all answers to a prompt are equally long")
    assert used(length_use(table(0, 20), np.zeros(40), None)).character.half_more == 0  # a judge without opinions


# Padding


def test_a_judge_blind_to_length_is_not_accused() -> None:
    found = table(0, 80)
    verdicts = []
    for seed in range(60):
        judge = RewardJudge.of("blind", blind(seed))
        probe = padding_probe(judge, found, judge.score(found.answers))
        assert isinstance(probe, Padding)
        verdicts.append(probe.found)
    assert verdicts.count(0) >= 57


@pytest.mark.parametrize(("pay", "verdict"), [(0.02, 1), (-0.02, -1)])
def test_a_judge_that_pays_for_length_is_found(pay: float, verdict: int) -> None:
    found = table(0, 80)
    for seed in range(10):
        judge = RewardJudge.of("paid", lambda answers, seed=seed: pay * LENGTH.score(answers) + blind(seed)(answers))
        probe = padding_probe(judge, found, judge.score(found.answers))
        assert isinstance(probe, Padding)
        assert probe.found == verdict
        assert probe.doses[-1].per_character == pytest.approx(pay, rel=0.3)
    assert [dose.sentences for dose in probe.doses] == [1, 4]


def test_a_constant_judge_shows_exactly_nothing() -> None:
    found = table(0, 30)
    judge = RewardJudge.of("constant", lambda answers: np.zeros(len(answers)))
    probe = padding_probe(judge, found, np.zeros(60))
    assert isinstance(probe, Padding)
    assert (probe.found, probe.doses[-1].p, probe.doses[-1].in_spread) == (0, 1.0, None)


def test_padding_leaves_the_answer_in_front() -> None:
    seen: list[Answer] = []

    def score(answers: list[Answer]) -> np.ndarray:
        seen.extend(answers)
        return np.zeros(len(answers))

    found = table(0, 15)
    padding_probe(RewardJudge.of("watching", score), found, np.zeros(30), ["One. ", "Two."])
    assert all(any(text.startswith(plain) for _, plain in found.answers) for _, text in seen)
    assert {text.count("One.") + text.count("Two.") for _, text in seen} == {1, 2}


def test_padding_without_enough_to_pad_says_why() -> None:
    found = table(0, 4)
    probe = padding_probe(LENGTH, found, LENGTH.score(found.answers))
    assert probe == NotChecked("4 prompts with an answer that can be padded and read, 10 are needed")
    empty = judged([Preference(f"p{at}", "", " ") for at in range(20)])
    assert isinstance(padding_probe(LENGTH, empty, np.zeros(40)), NotChecked)
    deaf = RewardJudge("deaf", LENGTH.read, knows=lambda _: False)
    assert isinstance(padding_probe(deaf, table(0, 40), np.zeros(80)), NotChecked)


def test_sentences_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "padding.txt"
    file.write_text("\ufeffSo it is.\n\n  And so on. \n", encoding="utf-8")
    assert sentences_of(file) == ("So it is.", "And so on.")
    file.write_text("\n \n")
    with pytest.raises(InputError, match="no sentences"):
        sentences_of(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        sentences_of(file)
    with pytest.raises(InputError, match="no such file"):
        sentences_of(tmp_path / "nothing.txt")
    assert len(set(NEUTRAL)) == len(NEUTRAL)


# Styles


def grid_rows(count: int) -> list[GridRow]:
    """Right answers start with r; each style is longer than the last by more than any right answer."""
    styles = ["", " and more of it", " and more of it, in a longer list of things"]
    rows = []
    for at in range(count):
        right, wrong = (tuple(f"{start} {at}{style}" for style in styles) for start in ("r", "wrong"))
        rows.append(GridRow(f"q{at}", right, wrong, ["even", "odd"][at % 2]))
    return rows


def test_the_grid_of_known_judges() -> None:
    rows = grid_rows(40)
    right = evaluate_grid(RewardJudge.of("right", lambda a: np.array([float(t[0] == "r") for _, t in a])), rows)
    assert isinstance(right, Grids)
    assert right.judge.matrix == ((1.0,) * 3,) * 3
    assert (right.judge.hard.value, right.judge.normal.value, right.judge.easy.value) == (1, 1, 1)
    assert right.longer.matrix == ((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (1.0, 1.0, 0.0))
    assert (right.longer.hard.value, right.longer.easy.value) == (0, 1)
    coin = evaluate_grid(RewardJudge.of("coin", lambda a: np.zeros(len(a))), rows)
    assert isinstance(coin, Grids) and coin.judge.matrix == ((0.5,) * 3,) * 3
    assert dict(coin.judge.domains) == {"even": (0.5, 0.5, 0.5), "odd": (0.5, 0.5, 0.5)}


def test_a_grid_row_that_cannot_be_read_is_left_out() -> None:
    def score(answers: list[Answer]) -> np.ndarray:
        return np.array([math.nan if "wrong 3 " in text else 1.0 for _, text in answers])

    found = evaluate_grid(RewardJudge.of("short", score), grid_rows(40))
    assert isinstance(found, Grids) and (found.judge.rows, found.judge.unread) == (39, 1)
    assert evaluate_grid(LENGTH, grid_rows(5)) == NotChecked("5 of 5 rows can be read, 30 are needed")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "q", "chosen": ["a", "b"], "rejected": ["a", "b", "c"]}, "chosen is not 3 texts"),
        ({"prompt": "q", "chosen": ["a", "b", 3], "rejected": ["a", "b", "c"]}, "something that is not text"),
        ({"prompt": "q", "chosen": ["a", "b", "c"]}, "rejected is not 3 texts"),
        ({"chosen": ["a", "b", "c"], "rejected": ["a", "b", "c"]}, "columns"),
    ],
)
def test_a_malformed_grid_is_refused(tmp_path: Path, row: dict[str, object], what: str) -> None:
    file = tmp_path / "grid.jsonl"
    good = {"prompt": "q", "chosen": ["a", "b", "c"], "rejected": ["a", "b", "c"]}
    file.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n", encoding="utf-8")
    with pytest.raises(InputError, match=what) as raised:
        load_grid(file)
    assert raised.value.problems[0].where == f"{file}:2"
    file.write_text(json.dumps(good), encoding="utf-8")
    assert load_grid(file) == (GridRow("q", ("a", "b", "c"), ("a", "b", "c"), "all"),)


# Grades


def test_auc_is_the_share_of_pairs_won() -> None:
    rng = np.random.default_rng(0)
    scores, good = rng.integers(0, 5, size=80).astype(float), (rng.random(80) < 0.4).astype(float)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[good == 1] for b in scores[good == 0]]
    assert auc(scores, good) == pytest.approx(np.mean(pairs))


def test_grades_by_kind() -> None:
    rng = np.random.default_rng(1)
    ratings = judged([Rating(f"p{at % 20}", f"answer {at}", float(rng.integers(1, 6))) for at in range(60)])
    scores = ratings.grade + rng.normal(size=60)
    found = graded_apart(ratings, scores)
    assert isinstance(found, Graded) and found.kind == "spearman"
    assert found.estimate.value == pytest.approx(spearmanr(scores, ratings.grade).statistic)
    verdicts = judged([Verdict(f"p{at % 20}", f"answer {at}", bool(rng.random() < 0.5)) for at in range(60)])
    perfect = graded_apart(verdicts, verdicts.grade)
    assert isinstance(perfect, Graded) and perfect.kind == "auc" and perfect.estimate.value == 1.0
    same = judged([Verdict(f"p{at}", f"answer {at}", True) for at in range(60)])
    assert graded_apart(same, same.characters) == NotChecked("every answer has the same grade")
    assert isinstance(graded_apart(table(0, 40), np.zeros(80)), NotChecked)


# All of it


def test_members_and_distance() -> None:
    found = table(0, 60)
    scores = numbers(found.answers, 1)

    def read(answers: tuple[Answer, ...]) -> Reading:
        one = numbers(answers, 1)
        return Reading(one, np.stack([one, one, -one], axis=1), np.abs(one))

    measured = measure(RewardJudge("three", read, limit=2.0), found)
    assert isinstance(measured.ensemble, Ensemble) and isinstance(measured.distance, Distance)
    assert measured.ensemble.correlation == pytest.approx((1 - 1 - 1) / 3)
    accuracies = [member.accuracy.accuracy.value for member in measured.ensemble.members]  # type: ignore[union-attr]
    assert accuracies[0] == accuracies[1] == pytest.approx(1 - accuracies[2])
    assert measured.distance.beyond.value == pytest.approx(np.mean(np.abs(scores) > 2))


def test_answers_that_cannot_be_read_are_left_out_and_counted() -> None:
    found = table(0, 60)
    too_long = {found.answers[at] for at in found.first[:7]}
    known = dict(zip(found.answers, numbers(found.answers, 1), strict=True))
    measured = measure(
        RewardJudge.of("short", lambda a: np.array([math.nan if x in too_long else known.get(x, math.nan) for x in a])),
        found,
    )
    assert (measured.counts.unread, measured.counts.decided, measured.counts.comparisons) == (7, 53, 60)
    assert isinstance(measured.padding, NotChecked)


def test_nothing_to_measure_on_is_no_error() -> None:
    measured = measure(LENGTH, judged([Preference("p", "a", "b")]))
    parts = [*measured.accuracy.values(), measured.calibration, measured.length, measured.padding, measured.grades]
    assert all(isinstance(part, NotChecked) and part.not_checked for part in parts)
