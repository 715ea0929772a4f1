"""O4: which use of which KL estimator has the gradient of KL(policy || reference), by enumeration.

"In the reward" is the score-function gradient E[c(y) grad log pi(y)] with the estimate c(y) held fixed; "as a loss" is
the gradient that automatic differentiation finds in the expected estimate when samples are held fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kedge.experiment.verify.enumerable import Space, random_table
from kedge.ops.kl import k1, k2, k3


@dataclass(frozen=True)
class Gradients:
    """A policy and a reference over one space; every method is a gradient in the policy's table."""

    space: Space
    policy: Tensor
    reference: Tensor

    @cached_property
    def table(self) -> Tensor:
        return self.policy.clone().requires_grad_()

    @cached_property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """[1, N, T] token log-probabilities of policy and reference."""
        return self.space.token_logprobs(self.table), self.space.token_logprobs(self.reference)

    @cached_property
    def probability(self) -> Tensor:
        """[1, N] of each sequence under the policy, detached."""
        return self.tokens[0].sum(-1).exp().detach()

    def of(self, scalar: Tensor) -> Tensor:
        return torch.autograd.grad(scalar, self.table, retain_graph=True)[0].flatten()

    def reverse_kl(self) -> Tensor:
        policy, reference = (x.sum(-1) for x in self.tokens)
        return self.of((policy.exp() * (policy - reference)).sum())

    def forward_kl(self) -> Tensor:
        policy, reference = (x.sum(-1) for x in self.tokens)
        return self.of((reference.exp() * (reference - policy)).sum())

    def in_reward(self, estimate: Tensor) -> Tensor:
        """`estimate` [1, N, T] per token, summed over the response."""
        return self.of((self.probability * estimate.detach().sum(-1) * self.tokens[0].sum(-1)).sum())

    def as_loss(self, estimate: Tensor) -> Tensor:
        """`estimate` [1, N] per sequence."""
        return self.of((self.probability * estimate).sum())


def setting(seed: int = 0) -> Gradients:
    space = Space(3, 4)
    return Gradients(space, random_table(space, seed, 0.9), random_table(space, seed + 50, 0.9))


def relative_error(gradient: Tensor, truth: Tensor) -> float:
    return float((gradient - truth).norm() / truth.norm())


def cosine(gradient: Tensor, truth: Tensor) -> float:
    return float(torch.cosine_similarity(gradient, truth, dim=0))


def test_k1_in_the_reward_is_right() -> None:
    g = setting()
    assert relative_error(g.in_reward(k1(*g.tokens)), g.reverse_kl()) < 1e-8


def test_k1_as_a_loss_is_nothing() -> None:
    g = setting()
    assert g.as_loss(k1(*g.tokens).sum(-1)).norm() < 1e-12 * g.reverse_kl().norm() + 1e-12


def test_k2_of_the_sequence_as_a_loss_is_right() -> None:
    g = setting()
    policy, reference = (x.sum(-1) for x in g.tokens)
    assert relative_error(g.as_loss(k2(policy, reference)), g.reverse_kl()) < 1e-8


def test_k2_of_the_tokens_as_a_loss_forgets_the_kl_that_follows() -> None:
    g = setting()
    assert relative_error(g.as_loss(k2(*g.tokens).sum(-1)), g.reverse_kl()) > 0.05


def test_k3_in_the_reward_is_reverse_minus_forward_kl() -> None:
    g = setting()
    policy, reference = (x.sum(-1, keepdim=True) for x in g.tokens)
    of_sequence = g.in_reward(k3(policy, reference))
    assert relative_error(of_sequence, g.reverse_kl() - g.forward_kl()) < 1e-8
    assert cosine(of_sequence, g.reverse_kl()) < 0.95


def test_k3_as_a_loss_is_the_forward_kl() -> None:
    g = setting()
    policy, reference = (x.sum(-1) for x in g.tokens)
    gradient = g.as_loss(k3(policy, reference))
    assert relative_error(gradient, g.forward_kl()) < 1e-8
    assert relative_error(gradient, g.reverse_kl()) > 0.05


def test_k2_k3_and_absolute_k1_in_the_reward_are_wrong() -> None:
    for estimator in (k2, k3, lambda p, r: k1(p, r).abs()):
        g = setting()
        assert cosine(g.in_reward(estimator(*g.tokens)), g.reverse_kl()) < 0.95


def test_full_vocabulary_kl_needs_the_kl_that_follows() -> None:
    g = setting()
    states, _ = g.space.path
    policy, reference = g.table.log_softmax(-1), g.reference.log_softmax(-1)
    per_state = (policy.exp() * (policy - reference)).sum(-1)[:, states] * g.space.mask  # [1, N, T]
    detached = g.as_loss(per_state.sum(-1))
    assert relative_error(detached, g.reverse_kl()) > 0.05
    following = per_state.flip(-1).cumsum(-1).flip(-1) - per_state  # sum over s > t
    future = g.of((g.probability[..., None] * following.detach() * g.tokens[0]).sum())
    assert relative_error(detached + future, g.reverse_kl()) < 1e-8
