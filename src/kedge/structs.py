"""The frozen structs that the loop turns into one another, with their shape checks.

Dimensions: B responses, P prompt tokens, T response tokens, C channels, N judged items of up to K
responses. Structs stay padded: prompts on the left,
responses on the right; only `train.update` rearranges rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _shape(name: str, tensor: Tensor, *shape: int) -> None:
    _expect(tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. `temperature` divides the logits in the sampler and in every scoring pass."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Prompts:
    """Prompts to answer; `group_id` numbers them, so that several answers to one prompt share it."""

    ids: Tensor  # [B, P] int64, left-padded
    mask: Tensor  # [B, P] bool
    group_id: Tensor  # [B] int64

    def __len__(self) -> int:
        return self.ids.shape[0]

    def rows(self, index: Tensor) -> Prompts:
        """The prompts at `index` (repeats allowed)."""
        return Prompts(self.ids[index], self.mask[index], self.group_id[index])


@dataclass(frozen=True)
class Rollouts:
    """Prompts and the responses drawn for them.

    `response_mask[b, t]` is true on tokens the policy produced, through EOS. It may have holes (tool or user turns):
    tokens in a hole are context, never trained on. `behaviour_logprobs` are of the distribution that was sampled from,
    temperature and truncation included, in nats. `group_id` numbers the prompt.
    """

    prompt_ids: Tensor  # [B, P] int64, left-padded
    prompt_mask: Tensor  # [B, P] bool
    response_ids: Tensor  # [B, T] int64, right-padded
    response_mask: Tensor  # [B, T] bool
    ended: Tensor  # [B] bool: the response closed with EOS within the token budget
    group_id: Tensor  # [B] int64
    behaviour_logprobs: Tensor  # [B, T] float
    policy_version: int = 0

    def __post_init__(self) -> None:
        batch, prompt = self.prompt_ids.shape
        _, response = self.response_ids.shape
        _shape("prompt_mask", self.prompt_mask, batch, prompt)
        _shape("response_ids", self.response_ids, batch, response)
        _shape("response_mask", self.response_mask, batch, response)
        _shape("behaviour_logprobs", self.behaviour_logprobs, batch, response)
        _shape("ended", self.ended, batch)
        _shape("group_id", self.group_id, batch)
        _expect(self.response_mask.dtype == torch.bool, "response_mask must be boolean")
        _expect(bool(self.response_mask.any(dim=1).all()), "every response needs at least one token of the policy")

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    @property
    def context_mask(self) -> Tensor:
        """[B, T] bool: true through the last token of the policy, holes included; false on padding."""
        return self.response_mask.flip(1).cummax(dim=1).values.flip(1)

    @property
    def last(self) -> Tensor:
        """[B] int64: position of the last true mask entry; the score lands here."""
        return self.context_mask.sum(dim=1) - 1

    @property
    def lengths(self) -> Tensor:
        """[B] int64: number of tokens the policy produced (EOS counts)."""
        return self.response_mask.sum(dim=1)

    def rows(self, index: Tensor) -> Rollouts:
        """The responses at `index`, trimmed to their longest prompt and response."""
        prompt_mask, context = self.prompt_mask[index], self.context_mask[index]
        first = self.prompt_ids.shape[1] - max(1, int(prompt_mask.sum(dim=1).max()))
        stop = max(1, int(context.sum(dim=1).max()))
        return replace(
            self,
            prompt_ids=self.prompt_ids[index, first:],
            prompt_mask=prompt_mask[:, first:],
            response_ids=self.response_ids[index, :stop],
            response_mask=self.response_mask[index, :stop],
            ended=self.ended[index],
            group_id=self.group_id[index],
            behaviour_logprobs=self.behaviour_logprobs[index, :stop],
        )


@dataclass(frozen=True)
class Judgments:
    """What annotators said of responses: N items, each of up to K responses to one prompt, scored and learnt together.

    Pairs and rankings hold the best first. `grades` are higher for better: votes as shares for pairs (s, 1 - s), minus
    the rank for rankings, the rating for ratings, 1 or 0 for verdicts. `margin` is how much better the first of a pair
    is, in the annotators' grades; 0 where nobody said. Entries of padding (`index` -1) are 0.
    """

    responses: Rollouts  # [M]
    index: Tensor  # [N, K] int64: rows of `responses`, -1 is padding
    grades: Tensor  # [N, K] float
    margin: Tensor  # [N] float, >= 0
    invented: Tensor | None = None  # [N] bool: made by padding an answer, not judged by anybody; None where none is

    def __post_init__(self) -> None:
        items, width = self.index.shape
        if self.invented is not None:
            _shape("invented", self.invented, items)
        _shape("grades", self.grades, items, width)
        _shape("margin", self.margin, items)
        _expect(bool((self.index[:, :1] >= 0).all()), "every item needs at least one response")
        _expect(int(self.index.max()) < len(self.responses) if items else True, "index points past the responses")

    def __len__(self) -> int:
        return self.index.shape[0]

    @property
    def mask(self) -> Tensor:
        """[N, K] bool: true where there is a response."""
        return self.index >= 0

    @property
    def lengths(self) -> Tensor:
        """[N, K] int64: tokens of each response, 0 on padding."""
        return self.responses.lengths[self.index.clamp(min=0)] * self.mask

    def rows(self, index: Tensor) -> Judgments:
        """The items at `index`; the responses stay whole."""
        invented = None if self.invented is None else self.invented[index]
        return Judgments(self.responses, self.index[index], self.grades[index], self.margin[index], invented)


@dataclass(frozen=True)
class TokenScores:
    """What one forward pass of a language model says about given responses, in nats, at the sampling temperature."""

    logprobs: Tensor  # [B, T] log-probability of the token taken
    eos_logprobs: Tensor  # [B, T] log-probability of ending here instead
    entropy: Tensor  # [B, T] entropy of the full next-token distribution


@dataclass(frozen=True)
class Opinion:
    """A reward model's score of each response and what tells how far to trust it."""

    score: Tensor  # [B] what counts as reward
    members: Tensor  # [B, M] each member's score, normalised
    distance: Tensor | None  # [B] from the training data, Mahalanobis; None where those are not known

    def __post_init__(self) -> None:
        _shape("members", self.members, len(self.score), self.members.shape[-1])
        if self.distance is not None:
            _shape("distance", self.distance, len(self.score))


@dataclass(frozen=True)
class ScoredRollouts:
    """Rollouts with the policy's, the reference's, the critic's and the rewarders' opinion of them."""

    rollouts: Rollouts
    old: TokenScores
    reference: TokenScores
    scores: Mapping[str, Tensor]  # terminal rewards by channel, [B], each in its own unit
    values: Tensor | None = None  # [B, T, heads] in channel units, the value before token t; None without a critic
    opinions: Mapping[str, Opinion] = field(default_factory=dict)  # by channel, of those that a reward model fills

    def __post_init__(self) -> None:
        shape = tuple(self.rollouts.response_ids.shape)
        _shape("old log-probabilities", self.old.logprobs, *shape)
        _shape("reference log-probabilities", self.reference.logprobs, *shape)
        for name, score in self.scores.items():
            _shape(f"scores[{name!r}]", score, shape[0])
        if self.values is not None:
            _shape("values", self.values, *shape, self.values.shape[-1])


@dataclass(frozen=True)
class Experience:
    """Rewards, advantages and returns per channel in channel units, and the affine map that PPO's advantage needs.

    The advantage that training uses is `(sum_c weights[b, c] * advantages[b, t, c] - shift[b]) / scale[b]`, exactly.
    `values` come from a critic or from a baseline. `returns` holds one column per critic head: the channels themselves,
    or one column for a scalar critic.
    """

    scored: ScoredRollouts
    channels: tuple[str, ...]
    rewards: Tensor  # [B, T, C]
    values: Tensor  # [B, T, C], zeros where nothing predicts the channel
    advantages: Tensor  # [B, T, C]
    returns: Tensor  # [B, T, heads]
    weights: Tensor  # [B, C] reward per channel unit
    gamma: float  # with which, and with `lam`, the advantages follow from rewards and values
    lam: float
    shift: Tensor  # [B] in reward units
    scale: Tensor  # [B] in reward units
    loss_beta: Tensor  # [B] advantage per nat: the coefficient of a KL term in the loss, 0 where there is none

    def __post_init__(self) -> None:
        batch, length = self.scored.rollouts.response_ids.shape
        count = len(self.channels)
        for name in ("rewards", "values", "advantages"):
            _shape(name, getattr(self, name), batch, length, count)
        _shape("weights", self.weights, batch, count)
        for name in ("shift", "scale", "loss_beta"):
            _shape(name, getattr(self, name), batch)

    def advantage(self) -> Tensor:
        """[B, T] the advantage that the policy loss uses, zero outside the response mask."""
        total = (self.weights[:, None, :] * self.advantages).sum(dim=-1)
        return (total - self.shift[:, None]) / self.scale[:, None] * self.scored.rollouts.response_mask

    def kl_per_response(self) -> Tensor:
        """[B] log policy - log reference of the whole response (k1), in nats."""
        gap = self.scored.old.logprobs - self.scored.reference.logprobs
        return gap.masked_fill(~self.scored.rollouts.response_mask, 0).sum(dim=1)

    def channel(self, name: str) -> Tensor:
        """[B] the channel's reward summed over the response, in channel units."""
        return self.rewards[..., self.channels.index(name)].sum(dim=1)


@dataclass(frozen=True)
class UpdateStats:
    """What the optimiser did with one batch. Scalars are [epochs, minibatches]; per-token fields are [B, T]."""

    policy_loss: Tensor
    kl_loss: Tensor  # the KL term of the loss, in the advantage's unit
    mix_loss: Tensor  # of the demonstrations mixed in, nats per token
    value_loss: Tensor  # [epochs, minibatches, heads], divided by each return's running variance
    approx_kl: Tensor  # k3 of old against new policy, nats per token
    clip_fraction: Tensor
    ratio_max: Tensor
    ratio_error: Tensor  # mean |ratio - 1|; on the first minibatch it must be 0 up to rounding
    entropy: Tensor  # nats per token
    policy_grad_norm: Tensor
    critic_grad_norm: Tensor
    left_out: Tensor  # 1 where the policy rested at its limit, else 0
    new_logprobs: Tensor  # [B, T] under the policy in the last epoch, before that minibatch's step
    active: Tensor  # [B, T] bool: the clip let the gradient of this token through in the last epoch

    def scalars(self) -> dict[str, Tensor]:
        """The fields measured per minibatch, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("new_logprobs", "active")}
