"""The trace's vocabulary: every metric with its unit and formula, and the columns of every Parquet file.

Writer, reader, glossary, plots and checks import these names, so they cannot drift apart. `<channel>`, `<head>` and
`<i>` in a metric's name stand for a reward channel, a critic head and a tercile of the reference's length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from kedge.errors import InputError, Problem

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
TEXT_MODES = ("full", "hashed", "none")
METADATA_KEY = b"kedge"


@dataclass(frozen=True)
class Metric:
    """One number that a run records over steps."""

    name: str
    unit: str
    meaning: str
    stage: str
    reduction: str

    def matches(self, name: str) -> bool:
        """True when `name` is this metric, placeholders filled in."""
        return re.fullmatch(re.sub(r"<\w+>", "[^/]+", self.name), name) is not None


def _metrics(stage: str, *rows: tuple[str, str, str, str]) -> tuple[Metric, ...]:
    return tuple(Metric(name, unit, meaning, stage, reduction) for name, unit, reduction, meaning in rows)


_RESPONSES = "mean over responses"
_TOKENS = "mean over response tokens"
_MINIBATCHES = "mean over minibatches"
_PAIRS = "mean over the step's pairs, each before its optimiser step"
_HELD_OUT = "mean over held-out pairs"
_PROMPTS = "mean over evaluation prompts"
_TERCILE = "mean over the prompts of tercile i (0: the reference is briefest)"

METRICS: tuple[Metric, ...] = (
    *_metrics(
        "sft",
        ("loss", "nats per token", "mean over response tokens of the batch", "-log pi(token)"),
        ("heldout/loss", "nats per token", "mean over held-out response tokens", "-log pi(token)"),
        ("heldout/perplexity", "1", "one value", "exp(heldout/loss)"),
        ("heldout/trigram_perplexity", "1", "one value", "perplexity of a 3-gram model of the same training text"),
    ),
    *_metrics(
        "reward",
        (
            "loss",
            "nats per item",
            "mean over items of the batch",
            "as the recipe says; -log sigmoid(r_chosen - r_rejected)",
        ),
        ("pairs/two_answers", "share", "mean over prompts", "two different answers were found"),
        ("pairs/log_length_ratio", "1", "mean over pairs", "|log(characters of one / of the other)|"),
        ("pairs/word_distance", "share", "mean over pairs", "1 - words of both / words of either"),
        ("heldout/accuracy", "share", "mean over held-out pairs", "r_chosen > r_rejected, ties half"),
        ("heldout/calibration_error", "share", "mean over bins, weighted by pairs", "|predicted - observed rate|"),
        ("heldout/length_correlation", "1", "one value", "correlation of score and response length"),
        ("heldout/length_only_accuracy", "share", "mean over held-out pairs", "the longer one was chosen, ties half"),
    ),
    *_metrics(
        "policy",
        (
            "score/mean",
            "normalised score",
            _RESPONSES,
            "reward-model score before any penalty, held within policy.score_clip",
        ),
        ("score/std", "normalised score", "standard deviation over responses", "spread of the score"),
        ("score/running_deviation", "normalised score", "over all scores so far", "what a running score is divided by"),
        ("rewards/<channel>/mean", "the rule's own", _RESPONSES, "a rule's number, held within its clip"),
        ("rewards/<channel>/std", "the rule's own", "standard deviation over responses", "spread of that number"),
        ("kl/reference_per_sequence", "nats per response", _RESPONSES, "k1: sum_t log pi_old - log pi_ref"),
        ("kl/reference_per_token", "nats per token", _TOKENS, "k1: log pi_old - log pi_ref"),
        ("kl/reference_per_sequence_k3", "nats per response", _RESPONSES, "k3: sum_t exp(-k1) - 1 + k1"),
        ("kl/original_per_sequence", "nats per response", _RESPONSES, "k1 against the supervised policy"),
        ("kl/beta", "reward per nat", "one value", "coefficient of the KL penalty in force"),
        ("kl/check", "nats per response", "mean over fresh responses", "exact KL of each next token, after the update"),
        ("kl/check_error", "nats per response", "standard error over them", "of `kl/check`"),
        ("kl/rejected", "updates", "one value", "taken back so far because they went past policy.kl.limit"),
        ("kl/branch", "returns", "one value", "returns so far to a policy inside policy.kl.limit"),
        ("kl/sampler_gap", "nats per token", _TOKENS, "|log behaviour - log pi_old|; 0 if sampler and learner agree"),
        ("entropy/per_token", "nats per token", _TOKENS, "-sum_v pi(v) log pi(v), sampling temperature"),
        ("length/mean", "tokens", _RESPONSES, "tokens the policy produced, EOS included"),
        ("length/ended", "share", _RESPONSES, "responses closed with EOS within the budget"),
        ("reward/mean", "reward", _RESPONSES, "sum_c w_c sum_t r_c"),
        ("advantage/mean", "reward", _TOKENS, "sum_c w_c A_c before whitening"),
        ("advantage/std", "reward", "standard deviation over response tokens", "sum_c w_c A_c before whitening"),
        ("policy/loss", "1", _MINIBATCHES, "minus the clipped surrogate, entropy bonus not included"),
        ("policy/kl_loss", "1", _MINIBATCHES, "KL term of the loss, coefficient included; 0 where KL is in the reward"),
        ("policy/mix_loss", "nats per token", _MINIBATCHES, "-log pi(token) of the demonstrations mixed in"),
        ("policy/left_out", "optimiser steps", "one value", "left out because the policy was past policy.kl.limit"),
        ("policy/approx_kl", "nats per token", _MINIBATCHES, "k3 of the old against the new policy"),
        ("policy/clip_fraction", "share", _MINIBATCHES, "tokens whose ratio the clip holds"),
        ("policy/ratio_max", "1", "largest over minibatches", "max_t pi_new / pi_old"),
        ("policy/first_ratio_error", "1", "first minibatch of the step", "mean |pi_new / pi_old - 1|, 0 when sound"),
        ("policy/grad_norm", "1", _MINIBATCHES, "policy gradient norm before clipping"),
        ("critic/grad_norm", "1", _MINIBATCHES, "critic gradient norm before clipping"),
        ("direct/loss", "1", _MINIBATCHES, "loss of the pairs, as ops/direct.py says"),
        ("direct/accuracy", "share", _PAIRS, "log pi / pi_ref is larger for chosen than for rejected, ties half"),
        ("direct/margin", "nats per response", _PAIRS, "log pi / pi_ref of chosen, minus that of rejected"),
        ("direct/chosen", "nats per response", _PAIRS, "log pi / pi_ref; below 0 chosen answers become less likely"),
        ("direct/rejected", "nats per response", _PAIRS, "log pi / pi_ref"),
        ("direct/heldout_loss", "1", _HELD_OUT, "`direct/loss` on held-out prompts, at each evaluation"),
        ("direct/heldout_accuracy", "share", _HELD_OUT, "`direct/accuracy` on held-out prompts, at each evaluation"),
        ("direct/heldout_margin", "nats per response", _HELD_OUT, "`direct/margin` on held-out prompts"),
        ("direct/heldout_chosen", "nats per response", _HELD_OUT, "`direct/chosen` on held-out prompts"),
        ("direct/heldout_rejected", "nats per response", _HELD_OUT, "`direct/rejected` on held-out prompts"),
        ("choice/groups", "prompts", "one value", "prompts whose answers were not all worth the same"),
        (
            "choice/reward_kept",
            "reward",
            "mean over those prompts",
            "sum_c w_c sum_t r_c of the best answer, KL left out",
        ),
        ("choice/loss", "nats per token", _MINIBATCHES, "-log pi(token) of the answers kept"),
        (
            "value/loss.<head>",
            "1",
            _MINIBATCHES,
            "clipped squared error of the head over twice its return's running variance",
        ),
        ("value/explained_variance.<head>", "1", "one value", "1 - Var(return - value) / Var(return) over tokens"),
        ("weight/<channel>", "reward per channel unit", _RESPONSES, "w_c; minus beta for kl"),
        (
            "uncertainty/disagreement",
            "normalised score",
            _RESPONSES,
            "standard deviation (M - 1) over the reward model's M members, each centred on the prompt: on its mean "
            "over n responses, times sqrt(n / (n - 1)), or, with one sample per prompt, on the score of a reference "
            "answer",
        ),
        (
            "uncertainty/beyond_support",
            "share",
            _RESPONSES,
            "Mahalanobis distance of the first member's last hidden state from its training data's, greater than that "
            "of 99% of held-out responses",
        ),
        (
            "uncertainty/longer_than_training",
            "share",
            _RESPONSES,
            "longer than 99% of the responses that the reward model was trained on",
        ),
    ),
    *_metrics(
        "evaluation",
        ("evaluation/score", "normalised score", _PROMPTS, "the policy's answer, before any penalty"),
        ("evaluation/score_reference", "normalised score", _PROMPTS, "the reference's answers to the same prompts"),
        (
            "evaluation/score_reference_within",
            "normalised score",
            "root mean square over prompts",
            "standard deviation of the reference's scores within a prompt: what choosing among its answers can gain",
        ),
        (
            "evaluation/kl_reference",
            "nats per response",
            _PROMPTS,
            "k1 on the reference's answers; minus it is the KL of reference from policy",
        ),
        ("evaluation/rewards/<channel>", "the rule's own", _PROMPTS, "a rule's number for the policy's answer"),
        ("evaluation/kl_per_sequence", "nats per response", _PROMPTS, "k1: sum_t log pi - log pi_ref"),
        ("evaluation/kl_per_token", "nats per token", "mean over evaluation tokens", "k1: log pi - log pi_ref"),
        (
            "evaluation/entropy",
            "nats per token",
            "mean over evaluation tokens",
            "-sum_v pi(v) log pi(v), sampling temperature",
        ),
        ("evaluation/length", "tokens", _PROMPTS, "the policy's answer"),
        ("evaluation/length_reference", "tokens", _PROMPTS, "the reference's answers to the same prompts"),
        ("evaluation/length_p10", "tokens", "10th percentile over prompts", "the policy's answer"),
        ("evaluation/length_p50", "tokens", "median over prompts", "the policy's answer"),
        ("evaluation/length_p90", "tokens", "90th percentile over prompts", "the policy's answer"),
        ("evaluation/ended", "share", _PROMPTS, "answers closed with EOS"),
        ("evaluation/win_rate", "share", _PROMPTS, "the policy's score beats the reference's, ties half"),
        ("evaluation/win_rate_low", "share", "one value", "lower end of the 95% Wilson interval"),
        ("evaluation/win_rate_high", "share", "one value", "upper end of the 95% Wilson interval"),
        ("evaluation/anchor_loss", "nats per token", "mean over held-out text tokens", "-log pi(token)"),
        (
            "evaluation/anchor_accuracy",
            "share",
            "mean over held-out text tokens",
            "the policy's likeliest next token is the one in the text",
        ),
        (
            "evaluation/tercile<i>/length_ratio",
            "1",
            _TERCILE,
            "mean length over the mean length of the reference's answers",
        ),
        ("evaluation/tercile<i>/kl_per_sequence", "nats per response", _TERCILE, "k1"),
        ("evaluation/tercile<i>/score", "normalised score", _TERCILE, "the policy's answer"),
    ),
    *_metrics(
        "truth",
        ("gold", "gold utility", _PROMPTS, "what the built-in world knows the answer is worth"),
        ("gold_reference", "gold utility", _PROMPTS, "the same of the reference's answers"),
        ("correct", "share", _PROMPTS, "right answers, right refusals, rightly unsure"),
        ("answered", "share", _PROMPTS, "answers that commit to something"),
        ("verbose", "share", _PROMPTS, "answers that the world calls verbose"),
        ("tercile<i>/gold", "gold utility", _TERCILE, "gold"),
        ("tercile<i>/correct", "share", _TERCILE, "correct"),
        ("tercile<i>/answered", "share", _TERCILE, "answered"),
    ),
    *_metrics(
        "timings",
        ("generate_s", "s", "one value", "sampling responses"),
        ("score_s", "s", "one value", "scoring under policy, reference, critic and rewards"),
        ("update_s", "s", "one value", "optimiser epochs"),
        ("trace_s", "s", "one value", "time the loop waited for the trace"),
        ("step_s", "s", "one value", "sampling, scoring and updating; trace and evaluation not included"),
    ),
)


def describe(name: str, stage: str) -> Metric | None:
    """The metric that `name` in `stage` is an instance of, or None."""
    return next((metric for metric in METRICS if metric.stage == stage and metric.matches(name)), None)


def unit(name: str, stage: str) -> str:
    """The unit of a metric, or an empty string for one that this version does not know."""
    known = describe(name, stage)
    return known.unit if known else ""


def check_version(found: Any, where: str) -> None:
    """Raise `InputError` unless `found` is a schema version that this package reads."""
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise InputError(Problem(where, f"schema version {found!r} is not a positive number", "is this a Kedge run?"))
    if found > VERSION:
        what = f"written with schema version {found}; this Kedge reads up to {VERSION}"
        raise InputError(Problem(where, what, "install a newer Kedge"))


# Columns. Lists have one entry per response position through the last token of the policy.

TOKEN_FLOATS = (
    "behaviour_logprob",
    "old_logprob",
    "reference_logprob",
    "new_logprob",
    "old_eos_logprob",
    "reference_eos_logprob",
    "entropy",
)
TRUST = ("disagreement", "support_distance")  # null where they are not known; older traces lack them
OPTIONAL = (*TOKEN_FLOATS, "active", "values", "ended", "group", "advantage", "beta", "score")
"""What another trainer may not tell; a trace names those it lacks in its metadata (`absent`)."""
LATER = (*TRUST, "loss_beta")  # columns that older traces lack
LATER_SAMPLES = ("reference_kl", "reference_tokens")


@cache
def _step_schema(channels: tuple[str, ...], members: int) -> pa.Schema:
    import pyarrow as pa

    floats = pa.list_(pa.float32())
    columns: list[tuple[str, pa.DataType]] = [
        ("step", pa.int32()),
        ("row", pa.int32()),
        ("group", pa.int64()),
        ("policy_version", pa.int32()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("response_mask", pa.list_(pa.bool_())),
        ("ended", pa.bool_()),
        ("active", pa.list_(pa.bool_())),
        *((name, floats) for name in TOKEN_FLOATS),
        *((f"reward.{channel}", floats) for channel in channels),
        *((f"value.{channel}", floats) for channel in channels),
        *((f"weight.{channel}", pa.float32()) for channel in channels),
        ("shift", pa.float32()),
        ("scale", pa.float32()),
        ("loss_beta", pa.float32()),
        ("advantage_sum", pa.float32()),
        ("advantage_abs_sum", pa.float32()),
        *((f"member.{member}", pa.float32()) for member in range(members)),
        *((name, pa.float32()) for name in TRUST),
    ]
    return pa.schema(columns)


def step_schema(channels: Sequence[str], members: int = 0) -> pa.Schema:
    """Columns of `trace/step-*.parquet`, one row a response. `members` counts those of a reward model of several."""
    return _step_schema(tuple(channels), members)


def probe_schema() -> pa.Schema:
    """Columns of `trace/probes-*.parquet`, one row per probe prompt and variant."""
    import pyarrow as pa

    return pa.schema(
        [
            ("step", pa.int32()),
            ("probe", pa.int32()),
            ("variant", pa.string()),
            ("prompt", pa.string()),
            ("response", pa.string()),
            ("length", pa.int32()),
            ("score", pa.float32()),
            ("logprob", pa.float32()),
            ("reference_logprob", pa.float32()),
            ("kl", pa.float32()),
            ("reference_length", pa.float32()),
            ("tercile", pa.int32()),
            ("beta", pa.float32()),
        ]
    )


def sample_schema() -> pa.Schema:
    """Columns of `trace/samples-*.parquet`, one row per evaluation prompt."""
    import pyarrow as pa

    return pa.schema(
        [
            ("step", pa.int32()),
            ("prompt", pa.string()),
            ("response", pa.string()),
            ("reference_response", pa.string()),
            ("response_tokens", pa.list_(pa.string())),
            ("token_kl", pa.list_(pa.float32())),
            ("score", pa.float32()),
            ("reference_score", pa.float32()),
            ("kl", pa.float32()),
            ("reference_kl", pa.float32()),
            ("length", pa.int32()),
            ("reference_tokens", pa.int32()),
            ("reference_length", pa.float32()),
            ("tercile", pa.int32()),
        ]
    )
