"""The matched net margin: on the same prompt, does the reward still pay for the verbose answer?

Net margin = score margin - beta * max(KL margin, 0) - length penalty * length margin, verbose minus brief. On its own
answers a policy moves towards the verbose one while this is above 0. Means over different prompts do not show it: easy
prompts have both brief answers and high advantages.

KL counts only where it costs. The probe answers are fixed texts; one that the policy has moved away from has a negative
log-ratio, more so the longer it is. The KL term then pulls back to the reference, which is no pressure to drift. The
margin with KL of either sign stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.trace.reader import Run

Array = NDArray[Any]
RESAMPLES = 2000
TERCILES = (0, 1, 2)


@dataclass(frozen=True)
class Pairs:
    """Probe prompts that have both answers, after `step` updates; arrays have one entry per prompt [N]."""

    step: int
    beta: float  # reward per nat
    penalty: float  # reward per token
    score: Array  # verbose minus brief, normalised score
    kl: Array  # verbose minus brief, nats
    length: Array  # verbose minus brief, tokens
    tercile: Array

    @property
    def net(self) -> Array:
        """[N] what the reward in force pays for the verbose answer, in reward."""
        return np.asarray(self.untaxed - self.penalty * self.length)

    @property
    def signed(self) -> Array:
        """[N] the same with KL of either sign: an answer that the policy has left earns what KL pulls it back with."""
        return np.asarray(self.score - self.beta * self.kl - self.penalty * self.length)

    @property
    def untaxed(self) -> Array:
        """[N] the same without the length penalty."""
        return np.asarray(self.score - self.kl_cost)

    @property
    def kl_cost(self) -> Array:
        """[N] reward that KL takes from the verbose answer beyond what it takes from the brief one."""
        return np.asarray(self.beta * np.maximum(self.kl, 0.0))


@dataclass(frozen=True)
class Margin:
    """Means over probe prompts after `step` updates, with a 95% interval of the net from resampled prompts."""

    step: int
    prompts: int
    beta: float  # reward per nat
    score: float  # normalised score
    kl: float  # nats, of either sign
    length: float  # tokens
    kl_cost: float  # reward: mean of beta * max(kl, 0)
    length_cost: float  # reward: penalty * length
    net: float  # reward
    low: float  # reward
    high: float  # reward
    share_positive: float
    signed: float  # reward: as the net, with the KL difference as it is, also where it is below 0
    share_signed: float  # of the prompts on which that is above 0
    tercile: int | None = None  # None: all prompts

    @property
    def pays(self) -> bool:
        """The verbose answer pays: the interval lies above 0 and more than half of the prompts do."""
        return self.low > 0 and self.share_positive > 0.5


def probe_pairs(run: Run, steps: Iterable[int] | None = None) -> Iterator[Pairs]:
    """The matched probe answers of every probe step, or of `steps`, in order; one step in memory at a time.

    Prompts lacking a variant or a score are left out.
    """
    weight = run.metrics("policy").get("weight/length")
    for step in run.probe_steps() if steps is None else steps:
        table = run.probes(step)
        if not len(table):
            continue
        names = [name for name in table.column_names if name not in ("prompt", "response")]
        rows = {name: table.column(name).to_numpy() for name in names}
        brief, verbose = (_first_by_probe(rows, variant) for variant in ("brief", "verbose"))
        both = sorted(set(brief) & set(verbose))
        one, other = [brief[probe] for probe in both], [verbose[probe] for probe in both]
        margin = {name: rows[name][other].astype(float) - rows[name][one] for name in ("score", "kl", "length")}
        known = np.isfinite(margin["score"]) & np.isfinite(margin["kl"])
        yield Pairs(
            step=int(step),
            beta=float(rows["beta"][0]),
            penalty=_penalty(weight, int(step)),
            **{name: values[known] for name, values in margin.items()},
            tercile=rows["tercile"][one][known],
        )


def _first_by_probe(rows: dict[str, Array], variant: str) -> dict[int, int]:
    """Probe number -> its first row of `variant`."""
    index = np.flatnonzero(rows["variant"] == variant)
    return {int(rows["probe"][at]): int(at) for at in index[::-1]}


def _penalty(weight: tuple[Array, Array] | None, step: int) -> float:
    """Length penalty in force after `step` updates: minus the length channel's weight at the nearest policy step."""
    if weight is None or not len(weight[0]):
        return 0.0
    steps, values = weight
    return float(-values[np.argmin(np.abs(steps - step))]) + 0.0  # no negative zero


def sampled_pairs(
    sample: Mapping[str, Any], feature: Array, usual: Array, *, beta: float, penalty: float = 0.0
) -> Pairs:
    """The policy's answers beside the reference's to the same prompts, as pairs: the one with more of a feature first.

    `sample` is an evaluation of a `View`; `feature` and `usual` [N] are the feature of the policy's and the reference's
    answers. Prompts on which it is the same, or anything is not known, are left out. Answers here are on the policy's
    own path, so that the margin of a feature that the policy has just taken up has paid its KL.
    """
    sign = np.sign(feature - usual)
    gap = {
        "score": sample["score"] - sample["reference_score"],
        "kl": sample["kl"] - sample["reference_kl"],
        "length": sample["length"] - sample["reference_tokens"],
    }
    gap = {name: sign * np.asarray(values, dtype=np.float64) for name, values in gap.items()}
    known = np.isfinite(sign) & (sign != 0) & np.isfinite(gap["score"]) & np.isfinite(gap["kl"])
    return Pairs(
        step=int(sample["step"]),
        beta=beta,
        penalty=penalty,
        **{name: values[known] for name, values in gap.items()},
        tercile=np.asarray(sample["tercile"])[known],
    )


def margin(pairs: Pairs, tercile: int | None = None, *, seed: int = 0) -> Margin | None:
    """Means over the prompts of `pairs`, or of one tercile; None when there are none."""
    here = np.full(len(pairs.score), True) if tercile is None else pairs.tercile == tercile
    if not here.any():
        return None
    net = pairs.net[here]
    low, high = bootstrap_interval(net, seed=seed)
    kl, length = float(pairs.kl[here].mean()), float(pairs.length[here].mean())
    return Margin(
        step=pairs.step,
        prompts=int(here.sum()),
        beta=pairs.beta,
        score=float(pairs.score[here].mean()),
        kl=kl,
        length=length,
        kl_cost=float(pairs.kl_cost[here].mean()),
        length_cost=pairs.penalty * length,
        net=float(net.mean()),
        low=low,
        high=high,
        share_positive=float((net > 0).mean()),
        signed=float(pairs.signed[here].mean()),
        share_signed=float((pairs.signed[here] > 0).mean()),
        tercile=tercile,
    )


def margins(run: Run, tercile: int | None = None) -> tuple[Margin, ...]:
    """The matched net margin of every probe step, over all prompts or one tercile of the reference's length."""
    found = (margin(pairs, tercile) for pairs in probe_pairs(run))
    return tuple(one for one in found if one is not None)


def bootstrap_interval(values: Array, *, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of `values` [N] under resampling with replacement."""
    draws = np.random.default_rng(seed).integers(0, len(values), size=(RESAMPLES, len(values)))
    means = values[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
