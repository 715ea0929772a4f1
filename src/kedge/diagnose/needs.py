"""What a trace may lack, and what can be checked without it.

A trace of another trainer holds what that trainer tells. Each check names the sources it needs; `a | b` means that
either will do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

SOURCES = {
    "behaviour_logprob": "log-probabilities of the sampler",
    "old_logprob": "log-probabilities of the policy before the update",
    "reference_logprob": "log-probabilities of the reference",
    "new_logprob": "log-probabilities of the policy after the update",
    "active": "which tokens the clip let through",
    "old_eos_logprob": "log-probabilities of ending under the policy",
    "reference_eos_logprob": "log-probabilities of ending under the reference",
    "entropy": "entropies",
    "values": "values of the critic",
    "ended": "whether responses ended",
    "group": "which responses answer the same prompt",
    "advantage": "advantages",
    "beta": "where and how much the KL is charged",
    "score": "scores",
    "prompts": "texts of prompts",
    "samples": "answers of policy and reference side by side",
    "probes": "fixed texts scored again and again",
    "evaluations": "metrics of evaluations",
    "labels": "joined labels",
    "members": "a second reward model",
}
"""Every source in words. Those up to `score` are columns of a step; the others are files or metrics of their own."""


def missing(needs: Iterable[str], absent: Collection[str]) -> tuple[str, ...]:
    """Those of `needs` that cannot be met where `absent` is not there."""
    return tuple(need for need in needs if all(one in absent for one in alternatives(need)))


def alternatives(need: str) -> tuple[str, ...]:
    """The sources of which one is enough."""
    return tuple(one.strip() for one in need.split("|"))


def in_words(needs: Iterable[str]) -> str:
    """Needs for people: comma between several, `or` between alternatives."""
    return ", ".join(" or ".join(SOURCES[one] for one in alternatives(need)) for need in needs)
