"""The best of n answers: how far drawing n and keeping one moves a policy, and what it gains.

pi_n, the policy that draws n answers of pi and returns the one with the highest score, is not trained; everything about
it follows from scores and log-probabilities of plain answers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bon_kl_bound(n: int) -> float:
    """log n - (n - 1) / n >= KL(pi_n || pi), in nats per response.

    The usual formula. It holds with equality only where no two answers are the same; where answers come again it is too
    large, without limit as n grows. Beirami et al. (2024).
    """
    return math.log(n) - (n - 1) / n


def bon_kl_estimate(selected_logprob: Tensor, n: int) -> Tensor:
    """[...] terms whose mean over answers of pi_n estimates KL(pi_n || pi), in nats per response.

    With e = pi(y) of the answer y that was kept and q = (1 - e)^n,
    q (log n + (n - 1) log(1 - e) - (n - 1) / n) + (1 - q) log((1 - q) / e). Beirami et al. (2024): close to the
    truth where answers are few, the bound where each is unlikely. `selected_logprob` is log e under pi.
    """
    log_e = selected_logprob.double()
    e = log_e.exp()
    log_miss = torch.log1p(-e.clamp(max=1 - 1e-15))
    missed = (n * log_miss).exp()
    hit = 1 - missed
    unlikely = missed * (bon_kl_bound(n) + (n - 1) * log_miss)
    tiny = torch.finfo(torch.float64).tiny  # an answer less likely than this is not drawn twice
    likely = torch.where(e > tiny, hit * (hit.clamp(min=tiny).log() - log_e), 0)
    return unlikely + likely


def best_of_n_mean(scores: Tensor, quantity: Tensor, n: int) -> Tensor:
    """[...] unbiased estimate of the mean `quantity` of the best of n answers, from N >= n answers [..., N] a prompt.

    The mean over all subsets of n: of the answers in order of score the i-th is the best of comb(i - 1, n - 1) among
    comb(N, n). With `quantity` the scores themselves it is Nakano et al. (2021, WebGPT), appendix I; Gao et al. (2023)
    apply it to the gold score too. Of equal scores the later answer is kept.
    """
    drawn = scores.shape[-1]
    if not 1 <= n <= drawn:
        raise ValueError(f"the best of {n} cannot be told from {drawn} answers")
    ranked = quantity.gather(-1, scores.argsort(dim=-1, stable=True)).double()
    place = torch.arange(1, drawn + 1, dtype=torch.float64)
    share = (_log_comb(place - 1, n - 1) - _log_comb(place.new_tensor(drawn), n)).exp()
    return (torch.where(place >= n, share, 0).to(ranked.device) * ranked).sum(dim=-1)


def _log_comb(count: Tensor, chosen: int) -> Tensor:
    """log of the binomial coefficient; not a number where `chosen` > `count`."""
    rest = count - chosen
    return torch.lgamma(count + 1) - math.lgamma(chosen + 1) - torch.lgamma(rest.clamp(min=0) + 1)
