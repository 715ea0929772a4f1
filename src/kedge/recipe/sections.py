"""The sections of a recipe: every key with its type, default and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Part = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
ChannelName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


def _named(value: Any) -> Any:
    """An empty path would mean the working directory."""
    if value == "":
        raise ValueError("empty")
    return value


# Strict fields take no string for a path, though a TOML file has nothing else.
File = Annotated[Path, Field(strict=False), BeforeValidator(_named)]


class Section(BaseModel):
    """Strict: `true` is not 1, "12" is not 12; whole numbers are fine where a number is expected."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Annotators(Section):
    """Simulated annotators: Bradley–Terry on gold utility plus biases, all in gold units."""

    length: Finite = Field(0.0, description="added per response token")
    tone: Finite = Field(0.0, description="added when the answer sounds certain")
    refusal: Finite = Field(0.0, description="added when the answer declines or is unsure")
    position: Finite = Field(0.0, description="added to the response shown first")
    noise: Share = Field(0.05, description="share of labels drawn by a coin")
    sharpness: Positive = Field(1.5, description="Bradley–Terry slope on the utility difference")


class Desk(Section):
    """The built-in support desk."""

    demonstrations: Count = Field(6000, description="demonstrations written for supervised fine-tuning")
    annotators: Annotators = Annotators()


class Data(Section):
    """Files a user brings: JSONL, Parquet, CSV or a saved `datasets` folder, standard or conversational."""

    demonstrations: File | None = Field(None, description="prompt and response columns")
    preferences: File | None = Field(None, description="prompt, chosen and rejected columns")
    prompts: File | None = Field(
        None, description="for the policy stage; the demonstrations' or preferences' if absent"
    )
    text: File | None = Field(None, description="plain text whose held-out loss anchors capability")
    neutral: File | None = Field(
        None, description="sentences that say nothing, one a line, for `reward.length`; English ones if absent"
    )
    holdout: Part = Field(0.1, description="share of prompts kept for evaluation, by hash of the prompt")
    max_rejected: Share = Field(0.0, description="share of malformed or overlong rows to tolerate; they are listed")


class Model(Section):
    """A Hugging Face model folder, or a model of a given size from scratch with a tokenizer trained on the data."""

    init: Annotated[str, Field(min_length=1)] = Field("scratch", description="`scratch` or the path of a model folder")
    family: Literal["llama", "gpt2"] = Field("llama", description="architecture of a model from scratch")
    hidden: Count = Field(64, description="width; a multiple of heads")
    layers: Count = Field(2, description="transformer blocks")
    heads: Count = Field(4, description="attention heads per block")
    vocab: Count = Field(4096, description="size of the tokenizer trained from the data (files only)")
    context: Count = Field(96, description="longest prompt plus response, tokens")
    trust_remote_code: bool = Field(False, description="run Python code found in the model folder")


class Sft(Section):
    """Supervised fine-tuning on demonstrations, loss on the response only."""

    steps: Count = Field(400, description="optimiser steps")
    batch_size: Count = Field(64, description="demonstrations per step")
    lr: Positive = Field(4e-3, description="highest learning rate, reached after the warm-up")
    warmup: Natural = Field(20, description="steps of linear warm-up before the cosine decay")
    weight_decay: NonNegative = Field(0.0, description="AdamW's; 0.1 to 1 where demonstrations are few")


class Pairs(Section):
    """Candidate pairs from the supervised policy for the annotators."""

    prompts: Count = Field(4000, description="prompts that get a pair")
    method: Literal["sample", "beam", "best_of"] = Field(
        "sample", description="how the two answers of a pair are found; best_of asks an interim reward model"
    )
    candidates: Annotated[int, Field(ge=2)] = Field(
        2, description="answers drawn per prompt, or beams searched; two different ones are compared"
    )
    temperature: Positive = Field(1.0, description="divides the logits before sampling")
    top_p: TopP = Field(1.0, description="samples from the smallest set of tokens with this much probability")
    checkpoints: Count = Field(1, description="number of checkpoints of supervised fine-tuning that sample, equally")


class Reward(Section):
    """Reward model: transformer and a scalar head at the last real token, learnt from what annotators said."""

    init: Annotated[str, Field(min_length=1)] = Field(
        "sft", description="what it begins as: `sft`, the supervised policy, or the path of a model folder"
    )
    epochs: Count = Field(3, description="passes over the judgments")
    batch_size: Count = Field(64, description="judged items per optimiser step")
    lr: Positive = Field(1e-3, description="highest learning rate")
    holdout: Part = Field(0.1, description="share of prompts whose judgments measure quality; at least data.holdout")
    loss: Literal["bradley_terry", "margin", "smoothed", "robust", "flip_aware", "davidson"] = Field(
        "bradley_terry", description="what a pair teaches"
    )
    flip_rate: Annotated[float, Field(ge=0, lt=0.5, allow_inf_nan=False)] = Field(
        0.1, description="share of labels taken to be flipped: smoothed, robust and flip_aware"
    )
    rankings: Literal["plackett_luce", "all_pairs", "tournament"] = Field(
        "plackett_luce", description="what a ranking teaches: its likelihood, every pair in it, or a knock-out's pairs"
    )
    ratings: Literal["regression", "ordinal"] = Field(
        "regression", description="what a rating teaches: its value, or its place among the grades"
    )
    centring: NonNegative = Field(
        0.0, description="weight of the squared mean score of an item, which holds scores at 0"
    )
    trunk: Literal["separate", "shared", "lora"] = Field(
        "separate", description="of several members: a model each, one with a head each, or low-rank adapters each"
    )
    members: Count = Field(1, description="reward models, or heads, that judge together")
    lora_rank: Count = Field(8, description="rank of the adapters")
    aggregate: Literal["mean", "worst", "mean_minus_variance"] = Field(
        "mean", description="how the members' normalised scores become one"
    )
    variance_weight: NonNegative = Field(0.1, description="taken off per unit of the members' variance")
    length: Literal["keep", "residual", "two_head", "product", "resample", "padded_residual", "padded_pairs"] = Field(
        "keep", description="how length is kept out of the score"
    )
    length_share: NonNegative = Field(
        1.0, description="of what length adds, taken off by the residuals; above 1 length costs"
    )


class Kl(Section):
    """How the policy is tied to the reference: where its divergence counts, how it is estimated, and how much."""

    place: Literal["reward", "loss"] = Field("reward", description="a channel of the reward, or a term of the loss")
    estimator: Literal["k1", "k2", "k3", "abs", "full"] | None = Field(
        None, description="k1 in the reward and k2 of the sequence in the loss if absent; full: over the vocabulary"
    )
    study: bool = Field(False, description="let estimators pass that do not hold the policy, to study them")
    mode: Literal["fixed", "adaptive", "lagrangian", "pid"] = Field(
        "fixed", description="keep beta, or steer the divergence to the target"
    )
    beta: NonNegative = Field(
        0.05, description="reward per nat; where a steered beta starts; the strength of dpo, online_dpo and ipo"
    )
    target: Positive = Field(6.0, description="nats per sequence that a steered beta aims at")
    horizon: Positive = Field(10000.0, description="adaptive: episodes over which a saturated error moves beta by 20%")
    rate: Positive = Field(0.1, description="lagrangian: change of log beta per step and relative error")
    proportional: NonNegative = Field(0.1, description="pid: beta per relative error")
    integral: NonNegative = Field(0.02, description="pid: beta per relative error, summed over steps")
    derivative: NonNegative = Field(0.0, description="pid: beta per rise of the relative error in a step")
    limit: Positive | None = Field(None, description="nats per sequence that the policy never passes; none if absent")
    at_limit: Literal["stop", "reject", "rollback"] = Field(
        "reject", description="then leave out the step's remaining updates, undo it, or go back to a checkpoint"
    )
    budgets: Annotated[tuple[Positive, Positive, Positive], Field(strict=False)] | None = Field(
        None, description="shares of the target by the reference's length: brief, middling, long; beta is over them"
    )


class Policy(Section):
    """Optimisation of the policy against the reward model."""

    method: Literal[
        "ppo", "a2c", "reinforce", "rloo", "grpo", "dr_grpo", "reinforce_pp",
        "dpo", "ipo", "online_dpo", "rejection", "best_of_n",
    ] = Field("ppo", description="the optimiser")  # fmt: skip
    steps: Count = Field(36, description="rounds of sampling, scoring and updating")
    branch: Natural = Field(0, description="number of a fork: other draws from the same start")
    prompts_per_step: Count = Field(96, description="prompts sampled in each step; dpo, ipo: pairs")
    samples_per_prompt: Count = Field(1, description="responses per prompt; a group, where the method compares them")
    max_new_tokens: Count = Field(48, description="token budget of a response")
    temperature: Positive = Field(1.0, description="divides the logits, in sampling and in every log-probability")
    epochs: Count = Field(2, description="passes over the responses of a step")
    minibatches: Count = Field(2, description="optimiser steps per epoch")
    microbatch: Count = Field(256, description="rows per forward pass; changes memory, not the result")
    lr: Positive = Field(3e-4, description="learning rate of the policy")
    critic_lr: Positive = Field(1e-3, description="learning rate of the critic")
    final_lr: Share = Field(0.1, description="both rates at the last step, as a share; linear in between")
    max_grad_norm: Positive = Field(1.0, description="gradients are scaled down to this norm")
    lora_rank: Natural = Field(0, description="rank of adapters that learn in the weights' place; 0 trains the weights")
    reference: Annotated[str, Field(min_length=1)] = Field(
        "sft", description="what the policy is tied to: `sft`, the supervised policy, or the path of a model folder"
    )
    reference_every: Natural = Field(0, description="steps after which the policy becomes the reference; 0 never")
    gamma: Share = Field(1.0, description="discount per token")
    lam: Share = Field(1.0, description="lambda of generalised advantage estimation")
    clip: Positive = Field(0.2, description="how far the probability ratio may leave 1 before its gradient stops")
    clip_high: Positive | None = Field(None, description="the same above 1; as `clip` if absent")
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = Field(
        None, description="ratio beyond which a negative advantage pulls no more; never if absent"
    )
    aggregation: Literal["token_mean", "sequence_sum", "sequence_mean", "constant"] | None = Field(
        None, description="how token losses become one; the method's own if absent"
    )
    importance_cap: Positive | None = Field(
        None, description="truncated importance weights of a sampler that differs from the learner; none if absent"
    )
    value_clip: Positive = Field(1.0, description="standard deviations of the return")
    entropy_bonus: NonNegative = Field(0.0, description="loss weight per nat per token")
    pretraining_mix: NonNegative = Field(0.0, description="loss weight of the demonstrations' likelihood (PPO-ptx)")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5, allow_inf_nan=False)] = Field(
        0.0, description="dpo, online_dpo: share of labels taken to be flipped"
    )
    whiten: bool = Field(True, description="shift and scale advantages to mean 0, variance 1 over the batch")
    critic: Literal["channels", "scalar"] = Field("channels", description="one head per reward channel, or one in all")
    critic_warmup: Natural = Field(0, description="first steps in which only the critic learns")
    score_normalisation: Literal["frozen", "running", "prompt"] = Field(
        "frozen", description="the score's unit: the reference's answers, all so far, or above its answer to the prompt"
    )
    score_clip: Positive = Field(10.0, description="normalised score units")
    missing_eos_penalty: NonNegative = Field(1.0, description="reward taken from a response that never ends")
    length_penalty: NonNegative = Field(0.0, description="reward taken per response token")
    target_penalty: NonNegative = Field(
        0.0, description="reward taken per token beyond the reference's own answer to the prompt"
    )
    overlong_penalty: NonNegative = Field(0.0, description="reward taken at the token budget, linear over the buffer")
    overlong_buffer: Count = Field(8, description="last tokens of the budget, over which overlong_penalty grows")
    repetition_penalty: NonNegative = Field(0.0, description="reward taken if every four tokens have come before")
    kl: Kl = Kl()


class Rule(Section):
    """A reward that is not a model: a channel of its own, added to the score."""

    kind: Literal["python", "regex", "http"] = Field(description="what gives the number")
    weight: Finite = Field(1.0, description="reward per unit of the channel")
    clip: Positive = Field(10.0, description="the number is held within plus and minus this")
    function: str = Field("", description="python: `file.py:name` or `package.module:name`")
    pattern: str = Field("", description="regex: 1 for a response in which it is found, else 0")
    url: str = Field("", description="http: receives prompts and responses as JSON, returns a list of numbers")
    timeout: Positive = Field(10.0, description="http: seconds to wait for an answer")
    retries: Natural = Field(3, description="http: further attempts after a failed one")


class Evaluate(Section):
    """The fixed evaluation set."""

    prompts: Count = Field(512, description="evaluation prompts, the same through the run")
    every: Count = Field(6, description="policy steps between evaluations")
    reference_samples: Count = Field(2, description="reference answers per prompt that define its usual length")


class Trace(Section):
    """What a run leaves to be looked at."""

    text: Literal["full", "hashed", "none"] = Field("full", description="how prompts and responses are kept")
    keep: Natural = Field(0, description="policy steps whose rows are kept; 0 keeps all")
    probes_every: Count = Field(3, description="policy steps between scorings of the probe pairs")
    probes: Count = Field(64, description="prompts with probe pairs")


class Checkpoint(Section):
    """What a stopped run goes on from."""

    every: Count = Field(5, description="policy steps between checkpoints")
    keep: Count = Field(2, description="checkpoints kept")


class Guard(Section):
    """Checks that look at the policy stage while it runs, and what follows when one of them fails."""

    checks: Annotated[tuple[str, ...], Field(strict=False)] = Field((), description="names of checks; empty: none")
    every: Count = Field(1, description="policy steps between looks")
    action: Literal["warn", "raise_beta", "stop", "roll_back"] = Field(
        "warn", description="an event, a larger beta, the end of the stage, or back to a checkpoint before the onset"
    )
    beta_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        2.0, description="raise_beta, roll_back: what beta is multiplied by"
    )
    patience: Count = Field(2, description="looks in a row at which the same check must fail")
    actions: Count = Field(3, description="times that the guard acts; then it only warns")


class Recipe(Section):
    """A whole run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run and its folder")
    seed: Seed = Field(0, description="the same seed and recipe give the same metrics")
    threads: Natural = Field(0, description="CPU threads; 0 leaves it to PyTorch")
    world: Literal["desk", "files"] = Field("desk", description="the built-in support desk, or the files in `[data]`")
    desk: Desk = Desk()
    data: Data = Data()
    model: Model = Model()
    sft: Sft = Sft()
    pairs: Pairs = Pairs()
    reward: Reward = Reward()
    policy: Policy = Policy()
    rewards: dict[ChannelName, Rule] = Field({}, description="rewards beside the reward model, by name")
    evaluate: Evaluate = Evaluate()
    trace: Trace = Trace()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
