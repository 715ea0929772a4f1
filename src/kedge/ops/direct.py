"""Losses of pairs that train a policy without a reward model, per pair; callers average them.

h = log(pi / pi_ref) of the chosen response - that of the rejected one, in nats, each *summed* over the response's
tokens. The sum is what the derivations are about: the policy that a loss is least at is pi_ref exp(something of the
response), which is a statement on the probability of whole responses. With a mean over tokens that something would be
multiplied by the response's length, and answers would be paid or charged for being long.
"""

from __future__ import annotations

from torch import Tensor

from kedge.ops.preferences import smoothed


def dpo(h: Tensor, beta: float | Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), in nats; e is the share of labels taken to be flipped.

    Rafailov et al. (2023), equation 7; with e > 0 the conservative DPO of Mitchell (2023), which is least at
    beta h = log((1 - e) / e) and not at infinity. Labels of Bradley–Terry with reward r lead to pi_ref exp(r / beta).
    """
    return smoothed(beta * h, label_smoothing)


def ipo(h: Tensor, tau: float) -> Tensor:
    """(h - 1 / (2 tau))^2, in square nats.

    Azar et al. (2023), equation 17. Labels of which y beats a response of the sampler mu with probability p(y) lead to
    pi_ref exp(p(y) / tau), whatever made the labels. Their target is bounded: a pair that always goes one way asks for
    a difference of 1 / (2 tau) nats and for no more.
    """
    return (h - 1 / (2 * tau)) ** 2
