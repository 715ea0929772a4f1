"""Each kind of judgment through the loss of a batch: by hand, and down to numbers that are known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from judged import answers, judged, pairs
from torch import Tensor, nn

from kedge.structs import Judgments
from kedge.train.objectives import Kind, Lesson, Ordinal, Pairwise, RewardSettings, kept_items, objective_of


def settings(**changed: Any) -> RewardSettings:
    return RewardSettings(**{"epochs": 1, "batch_size": 8, "lr": 1e-2, "seed": 0, **changed})


def loss_of(scores: list[list[float]], items: Judgments, kind: Kind, **changed: Any) -> float:
    """The loss of one member's scores [N, K] over all items."""
    lesson = Lesson(items, kind, settings(**changed), 1)
    return lesson(torch.tensor([scores]), torch.arange(len(items)), nn.Linear(2, 1)).item()


def plain(margin: float) -> float:
    return math.log(1 + math.exp(-margin))


PAIRS = pairs([1.0, 0.75, 0.5], [3, 3, 3], [2, 4, 3], margin=[3.0, 1.0, 0.0])
PAIR_SCORES = [[1.0, 0.4], [0.2, 0.9], [-0.3, 0.5]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bradley_terry", [plain(0.6), 0.75 * plain(-0.7) + 0.25 * plain(0.7), (plain(-0.8) + plain(0.8)) / 2]),
        # the largest margin, 3, asks to be ahead by 1; a vote for the other side asks for nothing
        (
            "margin",
            [plain(0.6 - 1), 0.75 * plain(-0.7 - 1 / 3) + 0.25 * plain(0.7), (plain(-0.8) + plain(0.8)) / 2],
        ),
        (
            "davidson",
            [
                -math.log(math.exp(0.3) / (2 * math.cosh(0.3) + 1)),
                -0.75 * math.log(math.exp(-0.35) / (2 * math.cosh(0.35) + 1))
                - 0.25 * math.log(math.exp(0.35) / (2 * math.cosh(0.35) + 1)),
                -math.log(1 / (2 * math.cosh(0.4) + 1)),
            ],
        ),
        (
            "flip_aware",
            [
                -math.log(0.2 + 0.6 / (1 + math.exp(-0.6))),
                -0.75 * math.log(0.2 + 0.6 / (1 + math.exp(0.7))) - 0.25 * math.log(0.2 + 0.6 / (1 + math.exp(-0.7))),
                -0.5 * math.log(0.2 + 0.6 / (1 + math.exp(0.8))) - 0.5 * math.log(0.2 + 0.6 / (1 + math.exp(-0.8))),
            ],
        ),
    ],
)
def test_a_batch_of_pairs_by_hand(name: str, expected: list[float]) -> None:
    assert loss_of(PAIR_SCORES, PAIRS, "pair", loss=name, flip_rate=0.2) == pytest.approx(sum(expected) / 3, abs=1e-6)


def test_smoothed_and_robust_pairs_by_hand() -> None:
    first, second = [plain(0.6), plain(-0.6)]
    one = PAIRS.rows(torch.tensor([0]))
    found = loss_of(PAIR_SCORES[:1], one, "pair", loss="smoothed", flip_rate=0.2)
    assert found == pytest.approx(0.8 * first + 0.2 * second, abs=1e-6)
    found = loss_of(PAIR_SCORES[:1], one, "pair", loss="robust", flip_rate=0.2)
    assert found == pytest.approx((0.8 * first - 0.2 * second) / 0.6, abs=1e-6)


RANKINGS = judged([[0, 1, 2, 3], [4, 5]], [[0.0, -1.0, -1.0, -2.0], [0.0, -1.0]], answers([2, 5, 3, 4, 6, 7]))
RANKING_SCORES = [[1.0, 0.5, -0.5, 0.2], [0.1, 0.3, 0.0, 0.0]]


def test_rankings_by_all_their_decided_pairs() -> None:
    """Five of the first item's six pairs are decided; each item weighs the same."""
    first = [plain(0.5), plain(1.5), plain(0.8), plain(0.3), plain(-0.7)]
    expected = (sum(first) / 5 + plain(-0.2)) / 2
    assert loss_of(RANKING_SCORES, RANKINGS, "ranking", rankings="all_pairs") == pytest.approx(expected, abs=1e-6)


def test_ties_of_rankings_count_where_ties_are_modelled() -> None:
    def won(margin: float) -> float:
        return -math.log(math.exp(margin / 2) / (2 * math.cosh(margin / 2) + 1))

    tied = math.log(2 * math.cosh(0.5) + 1)
    first = [won(0.5), won(1.5), won(0.8), won(0.3), won(-0.7), tied]
    found = loss_of(RANKING_SCORES, RANKINGS, "ranking", rankings="all_pairs", loss="davidson")
    assert found == pytest.approx((sum(first) / 6 + won(-0.2)) / 2, abs=1e-6)


def test_rankings_by_their_likelihood() -> None:
    weights = [math.exp(score) for score in RANKING_SCORES[0]]
    first = -math.log(weights[0] / sum(weights))
    first -= math.log(weights[1] / sum(weights[1:])) + math.log(weights[2] / sum(weights[1:]))
    expected = (first + plain(-0.2)) / 2
    assert loss_of(RANKING_SCORES, RANKINGS, "ranking") == pytest.approx(expected, abs=1e-6)


def test_a_tournament_of_two_is_the_pair() -> None:
    found = loss_of(RANKING_SCORES[1:], RANKINGS.rows(torch.tensor([1])), "ranking", rankings="tournament")
    assert found == pytest.approx(plain(-0.2), abs=1e-6)


def test_a_tournament_of_four_is_three_pairs_of_equal_weight() -> None:
    items = judged([[0, 1, 2, 3]], [[0.0, -1.0, -2.0, -3.0]], answers([2] * 4))
    one = torch.zeros(1, 1, 4)
    seen = set()
    for seed in range(20):
        objective = objective_of(items, "ranking", settings(rankings="tournament", seed=seed), 1)
        assert isinstance(objective, Pairwise)
        played = objective.wins[0].nonzero()
        assert objective.wins[0][tuple(played.T)].tolist() == pytest.approx([1 / 3] * 3)
        assert (played[:, 0] < played[:, 1]).all()  # the better wins
        assert objective.losses(one, torch.tensor([0])).item() == pytest.approx(math.log(2))
        seen.add(tuple(map(tuple, played.tolist())))
    assert len(seen) > 1


def test_ratings_by_hand() -> None:
    """1, 2 and 6 have mean 3 and variance 14/3."""
    items = judged([[0], [1], [2]], [[1.0], [2.0], [6.0]], answers([2, 2, 2]))
    scores = [[0.5], [0.0], [1.0]]
    deviation = (14 / 3) ** 0.5
    expected = sum((s[0] - (g - 3) / deviation) ** 2 for s, g in zip(scores, (1, 2, 6), strict=True)) / 3
    assert loss_of(scores, items, "rating") == pytest.approx(expected, abs=1e-6)
    assert objective_of(items, "rating", settings(), 1).numbers() == {
        "mean": [3.0],
        "deviation": [pytest.approx(deviation)],
    }


def test_verdicts_by_hand() -> None:
    """Three of four are good, so a score of 0 says 0.75."""
    items = judged([[0], [1], [2], [3]], [[1.0], [1.0], [1.0], [0.0]], answers([2] * 4))
    expected = -(3 * math.log(0.75) + math.log(0.25)) / 4
    assert loss_of([[0.0]] * 4, items, "verdict") == pytest.approx(expected, abs=1e-6)


COMPARED: list[tuple[Kind, dict[str, Any]]] = [
    *(("pair", {"loss": name}) for name in ("bradley_terry", "margin", "smoothed", "robust", "flip_aware", "davidson")),
    *(("ranking", {"rankings": name}) for name in ("plackett_luce", "all_pairs", "tournament")),
    ("pair", {"length": "resample"}),
    ("pair", {"length": "product"}),
    ("ranking", {"rankings": "all_pairs", "length": "resample"}),
]


@pytest.mark.parametrize(("kind", "how"), COMPARED)
def test_a_prompts_level_changes_no_comparison_but_centring_does(kind: Kind, how: dict[str, Any]) -> None:
    items = PAIRS if kind == "pair" else RANKINGS
    scores = PAIR_SCORES if kind == "pair" else RANKING_SCORES
    moved = [[score + 5 * (row + 1) for score in line] for row, line in enumerate(scores)]
    found = loss_of(scores, items, kind, **how)
    assert loss_of(moved, items, kind, **how) == pytest.approx(found, abs=1e-5)
    assert loss_of(moved, items, kind, **how, centring=0.01) > found + 0.1


def test_centring_of_pairs_is_the_squared_sum() -> None:
    bare = loss_of(PAIR_SCORES, PAIRS, "pair")
    found = loss_of(PAIR_SCORES, PAIRS, "pair", centring=0.01)
    assert found - bare == pytest.approx(0.01 * (1.4**2 + 1.1**2 + 0.2**2) / 3, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "how", "items"),
    [
        ("ranking", {"length": "resample"}, RANKINGS),
        ("rating", {"length": "resample"}, judged([[0], [1]], [[1.0], [2.0]], answers([2, 3]))),
        ("verdict", {"length": "resample"}, judged([[0], [1]], [[1.0], [0.0]], answers([2, 3]))),
        ("pair", {"length": "resample"}, pairs([1.0, 1.0], [5, 6], [2, 3])),
        ("pair", {"length": "two_head"}, PAIRS),
        ("pair", {"loss": "margin"}, pairs([1.0], [2], [3])),
        ("pair", {"loss": "robust", "flip_rate": 0.5}, PAIRS),
        ("rating", {}, judged([[0], [1]], [[4.0], [4.0]], answers([2, 2]))),
        ("rating", {"ratings": "ordinal"}, judged([[0], [1]], [[4.0], [4.0]], answers([2, 2]))),
        (
            "rating",
            {"ratings": "ordinal"},
            judged([[row] for row in range(21)], [[row / 7] for row in range(21)], answers([2] * 21)),
        ),
        ("verdict", {}, judged([[0], [1]], [[1.0], [1.0]], answers([2, 2]))),
        ("pair", {}, PAIRS.rows(torch.tensor([], dtype=torch.long))),
    ],
)
def test_what_cannot_be_learnt_is_said_before_training(kind: Kind, how: dict[str, Any], items: Judgments) -> None:
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        Lesson(items, kind, settings(**how), 1)


# Numbers beside the score


def descended(lesson: Lesson, scores: Tensor) -> None:
    """Fit a lesson's own numbers to fixed scores."""
    descent = torch.optim.LBFGS(lesson.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        descent.zero_grad()
        loss = lesson(scores, torch.arange(scores.shape[1]), nn.Linear(2, 1))
        loss.backward()
        return loss

    descent.step(closure)


def test_the_weight_of_ties_starts_and_ends_where_it_belongs() -> None:
    """Of pairs with equal scores a share nu / (2 + nu) is tied: at 0.2 that is nu = 0.5."""
    items = pairs([1.0] * 4 + [0.0] * 4 + [0.5] * 2, [3] * 10, [3] * 10)
    lesson = Lesson(items, "pair", settings(loss="davidson"), 1)
    lesson.settle()
    assert lesson.numbers()["tie_weight"] == pytest.approx([0.5], rel=0.02)
    descended(lesson, torch.zeros(1, 10, 2))
    assert lesson.numbers()["tie_weight"] == pytest.approx([0.5], rel=1e-3)


def test_thresholds_of_silent_scores_are_the_log_odds_of_the_grades() -> None:
    grades = [1.0] * 2 + [2.0] * 5 + [5.0] * 3
    items = judged([[row] for row in range(10)], [[grade] for grade in grades], answers([2] * 10))
    lesson = Lesson(items, "rating", settings(ratings="ordinal"), 1)
    lesson.settle()
    descended(lesson, torch.zeros(1, 10, 1))
    numbers = lesson.numbers()
    assert numbers["levels"] == [1, 2, 5]
    expected = [math.log(0.2 / 0.8), math.log(0.7 / 0.3)]
    assert numbers["thresholds"] == [pytest.approx(expected, abs=1e-3)]


@pytest.mark.parametrize("at", [-30.0, 0.0, 30.0])
def test_thresholds_increase_wherever_their_parameters_are(at: float) -> None:
    items = judged([[row] for row in range(4)], [[float(row)] for row in range(4)], answers([2] * 4))
    objective = objective_of(items, "rating", settings(ratings="ordinal"), 2)
    assert isinstance(objective, Ordinal)
    with torch.no_grad():
        objective.steps.fill_(at)
    assert (objective.thresholds().diff(dim=1) >= 0).all()


def test_a_start_without_ties_or_with_one_winner_stays_finite() -> None:
    for how in ({"loss": "davidson"}, {"length": "product"}):
        lesson = Lesson(pairs([1.0] * 6, [5, 6, 7, 8, 9, 9], [2, 2, 3, 3, 4, 1]), "pair", settings(**how), 1)
        lesson.settle()
        assert all(parameter.isfinite().all() for parameter in lesson.parameters())


# Members


def test_each_member_leaves_its_own_fifth_of_the_prompts_out() -> None:
    items = pairs([1.0] * 20, [3] * 20, [3] * 20)
    groups = torch.arange(20) // 2  # two pairs a prompt
    items = replace(items, responses=replace(items.responses, group_id=groups.repeat(2)))
    kept = kept_items(items, 4, 0)
    assert kept.shape == (4, 20) and (kept.sum(dim=1) == 16).all()
    assert torch.equal(kept[:, 0::2], kept[:, 1::2])
    assert len({tuple(row.tolist()) for row in kept}) > 1
    assert torch.equal(kept, kept_items(items, 4, 0)) and not torch.equal(kept, kept_items(items, 4, 1))
    assert kept_items(items, 1, 0).all()


def test_a_members_loss_is_over_what_it_keeps_and_members_weigh_the_same() -> None:
    items = pairs([1.0] * 5, [3] * 5, [3] * 5)
    lesson = Lesson(items, "pair", settings(), 2)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 5, 2, generator=generator)
    expected = []
    for member in range(2):
        there = [item for item in range(5) if lesson.kept[member, item]]
        assert len(there) == 4
        expected.append(sum(plain(float(scores[member, i, 0] - scores[member, i, 1])) for i in there) / 4)
    found = lesson(scores, torch.arange(5), nn.Linear(2, 2))
    assert found.item() == pytest.approx(sum(expected) / 2, abs=1e-6)


def test_padded_pairs_are_not_weighed_by_the_balance_of_the_others() -> None:
    """Three of four judged pairs went to the longer side: each counts 2/3 and the fourth 2. Padding counts 1."""
    judged_pairs = pairs([1.0] * 4, [5, 5, 5, 2], [2, 2, 2, 5])
    both = pairs([1.0] * 4 + [0.75] * 2, [5, 5, 5, 2, 3, 3], [2, 2, 2, 5, 9, 9])
    both = replace(both, invented=torch.tensor([False] * 4 + [True] * 2))
    alone = objective_of(judged_pairs, "pair", settings(length="resample"), 1)
    mixed = objective_of(both, "pair", settings(length="padded_pairs"), 1)
    assert alone.wins[:, 0, 1].tolist() == pytest.approx([2 / 3] * 3 + [2.0])
    assert mixed.wins[:4].tolist() == alone.wins.tolist()
    assert mixed.wins[4:, 0, 1].tolist() == [0.75, 0.75]
    assert both.rows(torch.tensor([4, 0])).invented.tolist() == [True, False]
