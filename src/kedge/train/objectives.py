"""What judgments of each kind teach the members of a reward model, and the loss of a batch.

Scores are [H, n, K]: members (heads of one model), items of a batch, responses of an item, 0 on padding. An objective
looks its items up by their number, so whatever depends on the training set alone is worked out once. Its own parameters
are numbers beside the score, such as the thresholds between grades; each member has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from kedge.ops import preferences
from kedge.structs import Judgments
from kedge.train.length import LengthExpert, Unteachable, balanced, two_head_penalty
from kedge.train.schedule import seeded

Kind = Literal["pair", "ranking", "rating", "verdict"]
MOST_LEVELS = 20  # beyond it the grades are a scale, and each threshold would rest on few ratings
LEFT_OUT = 5  # of several heads on one trunk, each leaves one prompt in five out


@dataclass(frozen=True)
class RewardSettings:
    """How a reward model is trained; what each name stands for, `docs/recipe.md` says."""

    epochs: int
    batch_size: int  # items
    lr: float
    seed: int
    loss: str = "bradley_terry"
    flip_rate: float = 0.1
    rankings: str = "plackett_luce"
    ratings: str = "regression"
    centring: float = 0.0
    length: str = "keep"


class Objective(nn.Module):
    """Per item the loss of each member's scores."""

    def losses(self, scores: Tensor, items: Tensor) -> Tensor:
        """[H, n] from scores [H, n, K] of the items numbered `items` [n]."""
        raise NotImplementedError

    def numbers(self) -> dict[str, list[Any]]:
        """What was learnt or fixed beside the score, for the record."""
        return {}


class Pairwise(Objective):
    """Mean loss of an item's pairs: `wins[n, i, j]` is the share of the item's evidence that says i beat j."""

    wins: Tensor

    def __init__(self, wins: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("wins", wins)
        self.loss = loss

    def losses(self, scores: Tensor, items: Tensor) -> Tensor:
        return (self.wins[items] * self.loss(_margins(scores))).sum(dim=(-2, -1))


class Margin(Objective):
    """Pairs whose winner has to be ahead by `required` [N], the annotators' margin over the largest of them."""

    wins: Tensor
    required: Tensor

    def __init__(self, wins: Tensor, margin: Tensor) -> None:
        super().__init__()
        if not margin.max() > 0:
            raise Unteachable("no pair says by how much its better side is better: there is no margin to require")
        self.register_buffer("wins", wins)
        self.register_buffer("required", margin / margin.max())

    def losses(self, scores: Tensor, items: Tensor) -> Tensor:
        required = torch.zeros_like(self.wins[items])
        required[:, 0, 1:] = self.required[items].unsqueeze(1)  # a vote for the other asks for no margin
        return (self.wins[items] * preferences.required_margin(_margins(scores), required)).sum(dim=(-2, -1))


class Davidson(Objective):
    """Pairs with ties; `ties[n, i, j]`, each pair once, is the share of the item's evidence that says i equals j."""

    wins: Tensor
    ties: Tensor

    def __init__(self, wins: Tensor, ties: Tensor, members: int) -> None:
        super().__init__()
        self.register_buffer("wins", wins)
        self.register_buffer("ties", ties)
        self.log_tie = nn.Parameter(torch.zeros(members))

    def losses(self, scores: Tensor, items: Tensor) -> Tensor:
        won, tied, _ = preferences.davidson(_margins(scores), self.log_tie.view(-1, 1, 1, 1)).unbind(dim=-1)
        return -(self.wins[items] * won + self.ties[items] * tied).sum(dim=(-2, -1))

    def numbers(self) -> dict[str, list[Any]]:
        return {"tie_weight": self.log_tie.exp().tolist()}


class PlackettLuce(Objective):
    """Rankings as their likelihood."""

    grades: Tensor
    mask: Tensor

    def __init__(self, grades: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("grades", grades)
        self.register_buffer("mask", mask)

    def losses(self, scores: Tensor, items: Tensor) -> Tensor:
        return preferences.plackett_luce(scores, self.grades[items], self.mask[items])


class Regression(Objective):
    """Ratings as numbers, in standard deviations from their mean."""

    ratings: Tensor

    def __init__(self, grades: Tensor) -> None:
        super().__init__()
        self.mean, self.deviation = float(grades.mean()), float(grades.std(correction=0))
        if not self.deviation > 0:
            raise Unteachable(f"all ratings are {self.mean:g}: there is nothing to tell apart")
        self.register_buffer("ratings", ((grades - self.mean) / self.deviation).flatten())

    def losses(self, scores: Tensor, items: Tensor) -> Tensor:
        return preferences.regression(scores[..., 0], self.ratings[items])

    def numbers(self) -> dict[str, list[Any]]:
        return {"mean": [self.mean], "deviation": [self.deviation]}


class Ordinal(Objective):
    """Ratings as grades in order. The thresholds' first is free, each next one lies a positive step above."""

    levels: Tensor

    def __init__(self, grades: Tensor, members: int) -> None:
        super().__init__()
        self.values, levels = grades.flatten().unique(return_inverse=True)
        if not 1 < len(self.values) <= MOST_LEVELS:
            what = f"{len(self.values)} different ratings; ordinal takes 2 to {MOST_LEVELS} grades"
            raise Unteachable(f"{what}, for others there is regression")
        self.register_buffer("levels", levels)
        self.steps = nn.Parameter(torch.zeros(members, len(self.values) - 1))

    def thresholds(self) -> Tensor:
        """[H, C - 1], increasing."""
        return torch.cat([self.steps[:, :1], softplus(self.steps[:, 1:])], dim=1).cumsum(dim=1)

    def losses(self, scores: Tensor, items: Tensor) -> Tensor:
        return preferences.ordinal(scores[..., 0], self.levels[items], self.thresholds())

    def numbers(self) -> dict[str, list[Any]]:
        return {"levels": self.values.tolist(), "thresholds": self.thresholds().tolist()}


class Verdicts(Objective):
    """Good or bad, against the share of good ones."""

    good: Tensor

    def __init__(self, grades: Tensor) -> None:
        super().__init__()
        self.base_rate = float(grades.mean())
        if not 0 < self.base_rate < 1:
            raise Unteachable(f"every verdict is {'good' if self.base_rate else 'bad'}: there is nothing to tell apart")
        self.register_buffer("good", grades.flatten())

    def losses(self, scores: Tensor, items: Tensor) -> Tensor:
        return preferences.verdict(scores[..., 0], self.good[items], self.base_rate)

    def numbers(self) -> dict[str, list[Any]]:
        return {"base_rate": [self.base_rate]}


def _margins(scores: Tensor) -> Tensor:
    """[..., K, K] of each response over each other."""
    return scores.unsqueeze(-1) - scores.unsqueeze(-2)


# Which objective


def objective_of(judgments: Judgments, kind: Kind, settings: RewardSettings, members: int) -> Objective:
    """The objective that `settings` names for judgments of this kind.

    Raises `Unteachable` where the judgments cannot teach it.
    """
    grades, mask = judgments.grades, judgments.mask
    if settings.length == "resample" and (kind in ("rating", "verdict") or _as_a_whole(kind, settings)):
        raise Unteachable("length is balanced between the sides of pairs: take pairs, or rankings as pairs")
    if kind == "verdict":
        return Verdicts(grades)
    if kind == "rating":
        return Ordinal(grades, members) if settings.ratings == "ordinal" else Regression(grades)
    if _as_a_whole(kind, settings):
        return PlackettLuce(grades, mask)
    ties_count = settings.loss == "davidson"
    wins, ties = _votes(grades, ties_count) if kind == "pair" else _places(judgments, settings, ties_count)
    if settings.length == "resample":
        wins = _balanced(wins, judgments)
    elif settings.length == "padded_pairs":
        with suppress(Unteachable):  # where only one side wins, padding alone says what length is worth
            wins = _balanced(wins, judgments)
    if settings.loss == "margin":
        return Margin(wins, judgments.margin)
    return Davidson(wins, ties, members) if ties_count else Pairwise(wins, _pair_loss(settings))


def _balanced(wins: Tensor, judgments: Judgments) -> Tensor:
    """Longer and shorter winners alike among what was judged; what padding makes up stays as it is."""
    judged = torch.ones(len(wins), dtype=torch.bool) if judgments.invented is None else ~judgments.invented
    weighed = wins.clone()
    weighed[judged] = balanced(wins[judged], judgments.lengths[judged])
    return weighed


def _as_a_whole(kind: Kind, settings: RewardSettings) -> bool:
    return kind == "ranking" and settings.rankings == "plackett_luce"


def _pair_loss(settings: RewardSettings) -> Callable[[Tensor], Tensor]:
    if settings.loss == "bradley_terry":
        return preferences.bradley_terry
    if not 0 <= settings.flip_rate < 0.5:
        raise Unteachable(f"a flip rate of {settings.flip_rate:g}; it is at least 0 and below 0.5")
    of_noise = {
        "smoothed": preferences.smoothed,
        "robust": preferences.robust,
        "flip_aware": preferences.flip_aware,
    }
    return partial(of_noise[settings.loss], flip_rate=settings.flip_rate)


def _votes(grades: Tensor, ties_count: bool) -> tuple[Tensor, Tensor]:
    """Wins and ties [N, 2, 2] of pairs: shares of votes; an even split is a tie only where ties are modelled."""
    tied = (grades[:, 0] == grades[:, 1]) & ties_count
    wins, ties = grades.new_zeros(2, len(grades), 2, 2)
    wins[:, 0, 1], wins[:, 1, 0] = grades[:, 0] * ~tied, grades[:, 1] * ~tied
    ties[:, 0, 1] = tied.to(grades.dtype)
    return wins, ties


def _places(judgments: Judgments, settings: RewardSettings, ties_count: bool) -> tuple[Tensor, Tensor]:
    """Wins and ties [N, K, K] of rankings, an item's adding up to 1; tied pairs count only where ties are modelled."""
    grades, mask = judgments.grades, judgments.mask
    if settings.rankings == "tournament":
        met = preferences.tournament(grades, mask, seeded(settings.seed, "tournament"))
    else:
        met = preferences.all_pairs(mask)
    over = _margins(grades)
    wins = (met & (over > 0)).to(grades.dtype)
    ties = (met & (over == 0) & ties_count).triu().to(grades.dtype)
    count = (wins + ties).sum(dim=(1, 2), keepdim=True).clamp(min=1)
    return wins / count, ties / count


# The loss of a batch


class Lesson(nn.Module):
    """The loss that a batch is trained on: the objective's mean, with centring and the length method beside it."""

    lengths: Tensor
    mask: Tensor
    kept: Tensor
    latest: Tensor  # [H, N, K] each item's scores when it was last in a batch

    def __init__(self, judgments: Judgments, kind: Kind, settings: RewardSettings, heads: int) -> None:
        super().__init__()
        if not len(judgments):
            raise Unteachable("no judgments to learn from")
        self.two_head = settings.length == "two_head"
        if self.two_head and heads != 2:
            raise Unteachable(f"two_head takes a model with two heads, quality and length; this one has {heads}")
        members = 1 if self.two_head else heads
        self.centring = settings.centring
        self.objective = objective_of(judgments, kind, settings, members)
        self.expert = LengthExpert(judgments.lengths, members) if settings.length == "product" else None
        self.register_buffer("lengths", judgments.lengths)
        self.register_buffer("mask", judgments.mask)
        self.register_buffer("kept", kept_items(judgments, members, settings.seed))
        self.register_buffer("latest", judgments.grades.new_zeros(members, *judgments.mask.shape))

    def forward(self, scores: Tensor, items: Tensor, head: nn.Linear) -> Tensor:
        """[] from scores [heads, n, K] that `head` gave the items numbered `items`."""
        lengths, mask = self.lengths[items], self.mask[items]
        learnt = scores.sum(dim=0, keepdim=True) if self.two_head else scores
        self.latest[:, items] = learnt.detach()
        loss = self._mean(self._with_expert(learnt, lengths), items)
        if self.centring:
            loss = loss + self.centring * preferences.centring(scores[: len(learnt)], mask).mean()
        if self.two_head:
            loss = loss + two_head_penalty(scores, lengths, mask, head)
        return loss

    def settle(self) -> None:
        """Fit the objective's own numbers and the length expert to the scores last given, 0 before there are any.

        What the expert could have said in the score's place is first taken off the score. They are else free to share
        it: at the start, before quality is known, a judge of length alone says too little, and the score would learn
        the rest for good.
        """
        parameters = list(self.parameters())
        if not parameters:
            return
        items = torch.arange(len(self.mask))
        scores = self.latest
        if self.expert is not None:
            scores = self.expert.unexplained(scores, self.lengths, self.mask)
        descent = torch.optim.LBFGS(parameters, max_iter=50, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            descent.zero_grad()
            ridge = torch.stack([(parameter**2).sum() for parameter in parameters]).sum()
            loss = self._mean(self._with_expert(scores, self.lengths), items) + 1e-3 * ridge
            loss.backward()
            return loss

        descent.step(closure)

    def numbers(self) -> dict[str, list[Any]]:
        """What was learnt or fixed beside the score, for the record."""
        expert = {} if self.expert is None else {"length_expert": self.expert.weight.tolist()}
        return self.objective.numbers() | expert

    def _with_expert(self, scores: Tensor, lengths: Tensor) -> Tensor:
        return scores if self.expert is None else scores + self.expert(lengths)

    def _mean(self, scores: Tensor, items: Tensor) -> Tensor:
        """Each member's mean over the items it does not leave out, and their mean."""
        kept = self.kept[:, items]
        means = (self.objective.losses(scores, items) * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
        return means.mean()


def kept_items(judgments: Judgments, members: int, seed: int) -> Tensor:
    """[H, N] bool: each of several members leaves out a random fifth of the prompts, so that heads are no copies.

    A fifth of fewer than five prompts is none.
    """
    _, prompt = judgments.responses.group_id[judgments.index[:, 0]].unique(return_inverse=True)
    prompts = int(prompt.max()) + 1
    kept = torch.ones(members, prompts, dtype=torch.bool)
    if members > 1:
        for member, row in enumerate(kept):
            order = torch.randperm(prompts, generator=seeded(seed, "left out", member))
            row[order[: prompts // LEFT_OUT]] = False
    return kept[:, prompt]
