"""Reward models of one or several members: how their scores become one, and their folders.

A member is a sequence classifier of its own, or one head of a classifier whose trunk it shares. Forward passes are in
`kedge.rollout.reward`. Dimensions: B responses, M members.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from kedge.errors import InputError, Problem
from kedge.models.correction import LengthCorrection
from kedge.models.folder import is_local
from kedge.models.heads import score_normalisation, set_score_normalisation
from kedge.models.load import (
    disable_dropout,
    load_classifier,
    reward_model_from,
    save_pretrained,
    write_folder,
)
from kedge.models.lora import add_adapters, merged
from kedge.models.support import Support, load_support, save_support
from kedge.ops.ensembles import mean_minus_variance, worst

Aggregate = Literal["mean", "worst", "mean_minus_variance"]
NUMBERS = "reward.json"
PADDING = "<|padding|>"


@dataclass(frozen=True)
class RewardModel:
    """What judges responses: members, how their scores become one, and the units of both.

    A member's raw score is normalised with its `means` and `scales`; the members are aggregated; `correction` (tokens
    to units of the aggregate) is taken off; `shift` and `scale` put the result at mean 0 and standard deviation 1 on
    the reference's samples, so that a beta means the same whatever judges.
    """

    models: tuple[Any, ...]  # one per member, or a single one with a head per member; frozen, eval mode
    means: tuple[float, ...]  # [M] of the raw score on the reference's samples
    scales: tuple[float, ...]  # [M] of the same
    aggregate: Aggregate = "mean"
    variance_weight: float = 0.0  # score per unit of variance, for mean_minus_variance
    shift: float = 0.0
    scale: float = 1.0
    correction: LengthCorrection | None = None
    support: Support | None = None

    @property
    def members(self) -> int:
        """How many judge."""
        return len(self.means)

    def normalised(self, raw: Tensor) -> Tensor:
        """[B, M] each member in standard deviations from its mean on the reference's samples."""
        columns = zip(raw.unbind(dim=1), self.means, self.scales, strict=True)
        return torch.stack([(column - mean) / scale for column, mean, scale in columns], dim=1)

    def aggregated(self, members: Tensor) -> Tensor:
        """[B] one score from normalised ones [B, M]."""
        match self.aggregate:
            case "mean":
                return members.mean(dim=1)
            case "worst":
                return worst(members)
            case "mean_minus_variance":
                return mean_minus_variance(members, self.variance_weight)

    def corrected(self, aggregate: Tensor, lengths: Tensor) -> Tensor:
        """[B] the aggregate without what length adds to it; `lengths` [B] in tokens."""
        return aggregate if self.correction is None else aggregate - self.correction(lengths).to(aggregate.dtype)

    def final(self, members: Tensor, lengths: Tensor) -> Tensor:
        """[B] the score: mean 0 and standard deviation 1 on the reference's samples."""
        return (self.corrected(self.aggregated(members), lengths) - self.shift) / self.scale


def reward_model(models: Sequence[Any], *, aggregate: Aggregate = "mean", variance_weight: float = 0.0) -> RewardModel:
    """Finished models as one reward model; a one-label model brings the normalisation in its config, if any."""
    units: list[tuple[float, float]] = []
    for model in models:
        heads = model.config.num_labels
        units += [score_normalisation(model)] if heads == 1 else [(0.0, 1.0)] * heads
    means, scales = zip(*units, strict=True)
    return RewardModel(tuple(models), means, scales, aggregate, variance_weight)


def new_member(policy: Any, seed: int, *, heads: int = 1, lora_rank: int | None = None) -> Any:
    """A sequence classifier to train from the policy's trunk; parameters that are not to be trained are frozen.

    With `lora_rank` the trunk is frozen and adapted. `seed` fixes heads and adapters.
    """
    model = reward_model_from(policy, seed, heads)
    return model if lora_rank is None else add_adapters(model, lora_rank, seed)


def finished(model: Any, *, heads: Sequence[int] | None = None) -> Any:
    """The trained model as it is kept, changed in place: frozen, adapters merged, only the score heads in `heads`."""
    model = merged(model)
    if heads is not None:
        rows, old = list(heads), model.score
        model.score = nn.Linear(old.in_features, len(rows), bias=old.bias is not None).to(old.weight)
        with torch.no_grad():
            model.score.weight.copy_(old.weight[rows])
            if old.bias is not None:
                model.score.bias.copy_(old.bias[rows])
        model.num_labels = model.config.num_labels = len(rows)
    return model.eval().requires_grad_(False)


def save_reward_model(reward_model: RewardModel, tokenizer: Any, path: str | Path) -> None:
    """Write the folder; it appears complete or not at all. Raises `InputError` where it cannot be written.

    A single model is an ordinary Hugging Face folder; several are one each in `member-0`, `member-1` and so on. What
    goes beyond one normalised score (members, correction) is in `reward.json`, the support in a file of its own.
    """
    numbers = _Numbers.of(reward_model)

    def fill(folder: Path) -> None:
        means, scales = iter(reward_model.means), iter(reward_model.scales)
        for part, model in zip(numbers.models, reward_model.models, strict=True):
            units = [(next(means), next(scales)) for _ in range(part.heads)]
            if part.heads == 1:
                set_score_normalisation(model, *units[0])
            save_pretrained(*_with_padding(model, tokenizer), folder / part.folder)
        if numbers.say_more_than_a_config():
            text = numbers.model_dump_json(by_alias=True, indent=2)
            (folder / NUMBERS).write_text(text + "\n", encoding="utf-8")
        if reward_model.support is not None:
            save_support(reward_model.support, folder)

    write_folder(path, fill)


def load_reward_model(path: str | Path) -> RewardModel:
    """The reward model in a folder that Kedge wrote, or any one-label sequence classifier as a single member.

    Frozen, eval mode, without dropout. Raises `InputError` for whatever is missing, damaged or unsafe.
    """
    folder = Path(path)
    if not is_local(path):
        return reward_model([_frozen(load_classifier(path))])
    if not (folder / NUMBERS).exists():
        single = reward_model([_frozen(load_classifier(path))])
        return replace(single, support=_support(folder, single.models[0]))
    numbers = _read_numbers(folder / NUMBERS)
    models = tuple(_frozen(load_classifier(folder / part.folder, part.heads)) for part in numbers.models)
    return RewardModel(
        models=models,
        means=numbers.means,
        scales=numbers.scales,
        aggregate=numbers.aggregate,
        variance_weight=numbers.variance_weight,
        shift=numbers.shift,
        scale=numbers.scale,
        correction=numbers.correction,
        support=_support(folder, models[0]),
    )


def _frozen(model: Any) -> Any:
    return disable_dropout(model).requires_grad_(False)


def _with_padding(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Model and tokenizer whose padding is no token of a response.

    transformers scores the last token that is not padding, by its id: where EOS pads, that would be the one before EOS.
    """
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_special_tokens({"pad_token": PADDING})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _support(folder: Path, model: Any) -> Support | None:
    support = load_support(folder)
    if support is not None and len(support.mean) != model.score.in_features:
        what = f"states have {len(support.mean)} numbers, the model's {model.score.in_features}"
        raise InputError(Problem(str(folder), what, "the support belongs to another model; remove it"))
    return support


_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Part(BaseModel):
    """A model folder and how many members are heads of it."""

    model_config = ConfigDict(extra="forbid")
    folder: Annotated[str, Field(pattern=r"^(\.|member-\d+)$")]
    heads: Annotated[int, Field(ge=1)]


class _Numbers(BaseModel):
    """`reward.json`."""

    model_config = ConfigDict(extra="forbid")
    version: Literal[1] = Field(1, alias="schema")
    models: Annotated[list[_Part], Field(min_length=1)]
    means: tuple[_Finite, ...]
    scales: tuple[_Positive, ...]
    aggregate: Aggregate
    variance_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    shift: _Finite
    scale: _Positive
    correction: LengthCorrection | None

    @model_validator(mode="after")
    def _counted(self) -> _Numbers:
        members = sum(part.heads for part in self.models)
        if not len(self.means) == len(self.scales) == members:
            raise ValueError(f"{len(self.means)} means and {len(self.scales)} scales for {members} members")
        return self

    @classmethod
    def of(cls, reward_model: RewardModel) -> _Numbers:
        """What a reward model's folder says of it."""
        models = reward_model.models
        names = ["."] if len(models) == 1 else [f"member-{number}" for number in range(len(models))]
        return cls(
            models=[_Part(folder=n, heads=model.config.num_labels) for n, model in zip(names, models, strict=True)],
            means=reward_model.means,
            scales=reward_model.scales,
            aggregate=reward_model.aggregate,
            variance_weight=reward_model.variance_weight,
            shift=reward_model.shift,
            scale=reward_model.scale,
            correction=reward_model.correction,
        )

    def say_more_than_a_config(self) -> bool:
        """False where mean and scale in the model's config are all there is to say."""
        return len(self.means) > 1 or self.correction is not None or (self.shift, self.scale) != (0, 1)


def _read_numbers(path: Path) -> _Numbers:
    try:
        return _Numbers.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else f"cannot be read: {error}"
        remedy = "take it from a copy, or install the Kedge that wrote it"
        raise InputError(Problem(str(path), what.removeprefix(": "), remedy)) from error
