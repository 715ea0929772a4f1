"""Where each method ends, in closed form: what theory says before anything is trained.

All distributions are log-probabilities over the sequences of a `Space`, [prompts, N]. Like `enumerable`, this module
knows nothing of the rest of the package.

The tilt exp(r / beta) of the reference is `Task.optimum`. Any policy's distance from it in the objective is
J(pi*) - J(pi) = beta KL(pi || pi*), and so for every other optimum of the form reference * exp(something / beta).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kedge.experiment.verify.enumerable import Task

SWEEPS = 2000
TOLERANCE = 1e-13


def divergence(left: Tensor, right: Tensor) -> float:
    """KL(left || right) in nats, the mean over prompts; a sequence that `left` never writes adds nothing."""
    gap = torch.where(left.exp() > 0, left - right, 0)
    return float((left.exp() * gap).sum(dim=-1).mean())


def variation(left: Tensor, right: Tensor) -> float:
    """Total variation distance, the largest over prompts."""
    return float((left.exp() - right.exp()).abs().sum(dim=-1).max() / 2)


def win_probability(task: Task, sampler: Tensor) -> Tensor:
    """[prompts, N] p(y beats mu): the chance that Bradley and Terry's annotator prefers y to a draw from `sampler`."""
    wins = torch.sigmoid(task.reward[:, :, None] - task.reward[:, None, :])
    return torch.einsum("pij,pj->pi", wins, sampler.exp())


def ipo(task: Task, sampler: Tensor, tau: float) -> Tensor:
    """Azar et al. (2023), 2310.12036, theorem 1 and section 5: reference * exp(p(y beats mu) / tau) / Z.

    The regression h(y, y') = (2 p(y beats y') - 1) / (2 tau) has, over pairs from mu x mu, the least-squares solution
    log(pi / reference)(y) = E_mu[p(y beats y')] / tau + constant.
    """
    return (task.reference_logprobs + win_probability(task, sampler) / tau).log_softmax(dim=-1)


def best_of(logprobs: Tensor, reward: Tensor, n: int, *, unlike: bool = False) -> Tensor:
    """The response with the highest reward among n draws: P(y) = F(y)^n - (F(y) - p(y))^n with F = P(reward <= r(y)).

    Rewards must differ from each other. Its KL from `logprobs` is at most log n - (n - 1) / n. With `unlike`, given
    that the n draws were not all the same response.
    """
    order = reward.argsort(dim=-1)
    sorted_probability = logprobs.exp().gather(-1, order)
    reached = sorted_probability.cumsum(dim=-1)
    chosen = reached**n - (reached - sorted_probability).clamp(min=0) ** n
    if unlike:
        chosen = chosen - sorted_probability**n
        chosen = chosen / chosen.sum(dim=-1, keepdim=True)
    return torch.zeros_like(chosen).scatter(-1, order, chosen).log()


def ranked_pairs(task: Task, label_smoothing: float) -> Tensor:
    """Where online DPO ends whose labels are the order of the rewards, smoothed by e.

    The coefficient of a response's log-probability is E_pi[P(y beats y') - sigmoid(beta h(y, y'))] over y' unlike y,
    with P = 1 - e or e by rank and h the difference of log(pi / reference). Weighted by pi it sums to zero, so it
    vanishes for every y where the gradient does. Found along the natural gradient. Without smoothing there is no such
    policy: beta h grows for ever, whatever the rewards' size. (Labels of Bradley and Terry lead to the tilt.)
    """
    above = (task.reward[:, :, None] > task.reward[:, None, :]).double()
    below = (task.reward[:, :, None] < task.reward[:, None, :]).double()
    wins = (1 - label_smoothing) * above + label_smoothing * below
    logprobs = task.reference_logprobs
    for _ in range(SWEEPS):
        ratio = logprobs - task.reference_logprobs
        odds = torch.sigmoid(task.beta * (ratio[:, :, None] - ratio[:, None, :]))
        pull = torch.einsum("pij,pj->pi", wins - odds * (above + below), logprobs.exp())
        if float(pull.abs().max()) < TOLERANCE:
            return logprobs
        logprobs = (logprobs + 2 / task.beta * pull).log_softmax(dim=-1)
    raise ArithmeticError("the fixed point of online DPO was not found")


def grpo(task: Task, group: int, epsilon: float) -> Tensor:
    """Where GRPO ends whose KL stands in the loss, for groups of `group` responses.

    A response's coefficient is (A(y) - beta K(y)) / L(y): A is its standardised advantage in expectation over the rest
    of its group, K = log(pi / reference), and 1 / L comes of averaging each response over its own tokens. The gradient
    vanishes where this is the same c for all y, so

        pi(y) = reference(y) exp((A(y) - c L(y)) / beta),

    c such that it sums to 1. A depends on pi, which is found by damped iteration. For large groups A is
    (r - E r) / sigma(pi): the tilt of strength beta sigma, another one for each prompt, and a reward of -c = beta KL /
    E[L] per token on top. Neither is in the objective.
    """
    found = [_grpo_of_prompt(task, prompt, group, epsilon) for prompt in range(task.space.prompts)]
    return torch.stack(found)


def _grpo_of_prompt(task: Task, prompt: int, group: int, epsilon: float) -> Tensor:
    reference, lengths = task.reference_logprobs[prompt], task.space.lengths.double()
    others = _Others(task.reward[prompt], group, epsilon)
    logprobs = reference
    for _ in range(SWEEPS):
        pull = others.advantage(logprobs) / task.beta
        target = reference + pull - _length_price(reference + pull, lengths) * lengths
        if float((target - logprobs).abs().max()) < TOLERANCE:
            return target
        logprobs = (logprobs + target) / 2
    raise ArithmeticError("GRPO's fixed point was not found")


def _length_price(scores: Tensor, lengths: Tensor) -> float:
    """c with sum exp(scores - c lengths) = 1, by bisection: the sum falls as c rises."""
    low, high = -100.0, 100.0
    while high - low > 1e-15 * max(1.0, abs(low)):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        total = float((scores - middle * lengths).logsumexp(dim=0))
        low, high = (middle, high) if total > 0 else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class _Others:
    """Every multiset of the other `group` - 1 responses, and what a response's advantage is beside each."""

    reward: Tensor  # [N]
    group: int
    epsilon: float

    def advantage(self, logprobs: Tensor) -> Tensor:
        """[N] E[(r(y) - mean) / (deviation + epsilon)] over the rest of the group, drawn from `logprobs` [N]."""
        counts, ways = self._multisets()
        chance = (counts @ logprobs + ways).exp()  # [M]
        total = counts @ self.reward + self.reward[:, None]  # [N, M]
        squares = counts @ self.reward**2 + self.reward[:, None] ** 2
        mean = total / self.group
        variance = (squares - self.group * mean**2).clamp(min=0) / (self.group - 1)
        each = (self.reward[:, None] - mean) / (variance.sqrt() + self.epsilon)
        return each @ chance

    def _multisets(self) -> tuple[Tensor, Tensor]:
        """[M, N] how often each response occurs, and [M] the log of the number of orders."""
        size, kinds = self.group - 1, len(self.reward)
        chosen = torch.tensor(list(itertools.combinations_with_replacement(range(kinds), size)))
        counts = torch.zeros(len(chosen), kinds, dtype=torch.float64)
        counts.scatter_add_(1, chosen, torch.ones(chosen.shape, dtype=torch.float64))
        return counts, math.lgamma(size + 1) - torch.lgamma(counts + 1).sum(dim=1)
