"""A veRL run recorded from `_log_rollout_data`, which the trainer calls with everything a step has computed.

Written against the published source of verl-project/verl and not run inside veRL: `verl/trainer/ppo/v1/trainer_base.py`
(commit 04141f84a3659afa267acb2766bee5683ad555b2: `PPOTrainer._log_rollout_data(batch: KVBatchMeta, timing_raw,
rollout_data_dir)`, the names of the fields, padding rows marked in `batch.tags`), `verl/trainer/ppo/ray_trainer.py`
(commit 0094eb2057e6f3210c2a4fca88704689d02879aa: `RayPPOTrainer._log_rollout_data(batch: DataProto, ...)`,
`apply_kl_penalty`) and `verl/trainer/ppo/core_algos.py` (commit 018f23b5f83a13340421349e40ec42530739b23a: what each
estimator centres and divides by).

What a reader of the numbers has to know: veRL logs its KL, and aims its controller, as the mean over responses of a
mean over tokens; scores sit on the last response token; token ids are kept with EOS, which veRL's own JSONL is not.
Dimensions: B responses, P prompt tokens, T response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.recorders.guarded import Guarded
from kedge.recorders.settings import known, setting, versioned
from kedge.trace.foreign import Conventions, Rows, padded, to_array
from kedge.trace.writer import TextMode

Array = NDArray[Any]
Lists = list[Any]  # one array a response, none padded

TOKEN_FIELDS = {  # veRL's name -> the name in a trace
    "rollout_log_probs": "behaviour_logprob",
    "old_log_probs": "old_logprob",
    "ref_log_prob": "reference_logprob",
    "entropy": "entropy",
    "values": "values",
    "advantages": "advantage",
}
FIELDS = ("uid", "prompts", "responses", "response_mask", "rm_scores", "token_level_rewards", *TOKEN_FIELDS)
ESTIMATORS = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
NORMALISATIONS = {
    "gae": "batch",
    "rloo": "leave one out",
    "rloo_vectorized": "leave one out",
    "reinforce_plus_plus": "batch",
    "reinforce_plus_plus_baseline": "group mean and batch",
}
AGGREGATIONS = {
    "token-mean": "token_mean",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum-norm": "constant",
}


def record(
    trainer_class: type,
    out: Path | str,
    *,
    name: str | None = None,
    text: TextMode = "full",
    keep: int = 0,
    eos_ids: Collection[int] = (),
    resume: bool = False,
) -> Guarded:
    """Make every trainer of this class, subclasses included, leave a trace in `out`.

    `trainer_class` is `verl.trainer.ppo.v1.trainer_base.PPOTrainer` or the legacy
    `verl.trainer.ppo.ray_trainer.RayPPOTrainer`. Its `_log_rollout_data` is wrapped in place, because veRL picks the
    subclass itself; it is called only where `trainer.rollout_data_dir` is set, and still writes there. `out` should be
    absolute: the trainer runs in a Ray process whose folder is another one. `eos_ids` are the tokens that end a
    response, the tokenizer's EOS where none is given. `text`, `keep`, `name` and `resume` are those of
    `kedge.trace.recorder.Recorder`. What is returned may be closed when the training is over; else the end of the
    process does it.
    """
    original = trainer_class._log_rollout_data  # type: ignore[attr-defined]
    guarded = Guarded(out, name=name, text=text, keep=keep, resume=resume)

    @wraps(original)
    def logged(self: Any, batch: Any, *rest: Any, **named: Any) -> Any:
        def rows() -> Rows | None:
            found = columns(batch)
            return rows_of(
                found,
                self.config,
                step=int(self.global_steps) - 1,  # veRL counts from 1
                ending=tuple(eos_ids) or _eos(self.tokenizer),
                decode=None if text == "none" else _decoder(self.tokenizer),
            )

        guarded.step(rows, lambda: conventions_of(self.config), lambda: settings_of(self.config))
        return original(self, batch, *rest, **named)

    trainer_class._log_rollout_data = logged  # type: ignore[attr-defined]
    return guarded


@dataclass(frozen=True)
class Columns:
    """A step's batch with the padding gone; lists have one entry a response."""

    uid: list[str]
    prompts: Lists  # token ids
    responses: Lists  # token ids, tool turns included
    mask: Lists  # bool, true on the policy's tokens
    tokens: Mapping[str, Lists]  # veRL's names -> one number a response token
    version: int | None = None  # updates behind the oldest of the sampling weights
    padding: list[bool] = field(default_factory=list)  # rows that veRL added to fill a mini-batch


def columns(batch: Any) -> Columns:
    """The batch that either trainer hands over, as lists."""
    return _from_queue(batch) if hasattr(batch, "partition_id") else _from_proto(batch)


def _from_queue(batch: Any) -> Columns:
    """A v1 batch: keys of rows that lie, unpadded, in the transfer queue. Fields that the run lacks do not come."""
    data = import_module("transfer_queue").kv_batch_get(
        keys=batch.keys, partition_id=batch.partition_id, select_fields=[*FIELDS]
    )
    versions = [tag["min_global_steps"] for tag in batch.tags if tag.get("min_global_steps") is not None]
    return Columns(
        uid=[str(uid) for uid in data["uid"].tolist()],
        prompts=_rows(data["prompts"]),
        responses=_rows(data["responses"]),
        mask=[row.astype(bool) for row in _rows(data["response_mask"])],
        tokens={
            name: _rows(data[name]) for name in ("rm_scores", "token_level_rewards", *TOKEN_FIELDS) if name in data
        },
        version=int(min(versions)) if versions else None,
        padding=[bool(tag.get("is_padding", False)) for tag in batch.tags],
    )


def _from_proto(batch: Any) -> Columns:
    """A legacy batch: one padded tensor a field, prompts on the left, responses on the right."""
    tensors = {name: to_array(batch.batch[name]) for name in batch.batch.keys()}  # noqa: SIM118 (a TensorDict)
    prompt_width = tensors["prompts"].shape[1]
    attention = tensors["attention_mask"].astype(bool)
    asked, answered = attention[:, :prompt_width], attention[:, prompt_width:]
    mask = tensors.get("response_mask", answered).astype(bool)
    names = {"rm_scores": "token_level_scores", **{name: name for name in ("token_level_rewards", *TOKEN_FIELDS)}}
    return Columns(
        uid=[str(uid) for uid in batch.non_tensor_batch["uid"]],
        prompts=_cut(tensors["prompts"], asked),
        responses=_cut(tensors["responses"], answered),
        mask=_cut(mask, answered),
        tokens={ours: _cut(tensors[theirs], answered) for ours, theirs in names.items() if theirs in tensors},
        padding=[False] * len(mask),
    )


def _rows(tensor: Any) -> Lists:
    """The rows of a nested or padded tensor."""
    return [to_array(row) for row in tensor.unbind()]


def _cut(values: Array, keep: Array) -> Lists:
    return [row[here] for row, here in zip(values, keep, strict=True)]


def rows_of(
    found: Columns,
    config: Any,
    *,
    step: int,
    ending: Collection[int] = (),
    decode: Callable[[Array], str] | None = None,
) -> Rows | None:
    """The step as the trace wants it, or None where no response holds a token that was learnt from.

    Rows that veRL added as padding, or whose every token its rollout correction rejected, are left out. `beta` is
    solved from the rewards: by now the controller has moved on to the next step's.
    """
    kept = [row for row, mask in enumerate(found.mask) if mask.any() and not found.padding[row]]
    if not kept:
        return None
    pick: Callable[[Lists], Lists] = lambda lists: [lists[row] for row in kept]  # noqa: E731
    mask, responses, prompts = pick(found.mask), pick(found.responses), pick(found.prompts)
    tokens = {name: pick(lists) for name, lists in found.tokens.items()}
    uids = [found.uid[row] for row in kept]
    asked: list[Any] = [np.ones(len(ids), dtype=bool) for ids in prompts]
    named: dict[str, Any] = {ours: padded(tokens[theirs]) for theirs, ours in TOKEN_FIELDS.items() if theirs in tokens}
    numbers = {uid: number for number, uid in enumerate(dict.fromkeys(uids))}
    return Rows(
        step=step,
        response_mask=padded(mask, fill=False),
        scores={"score": _scores(tokens["rm_scores"])} if "rm_scores" in tokens else {},
        group=np.array([numbers[uid] for uid in uids]),
        prompts=[decode(ids) for ids in prompts] if decode else None,
        responses=[decode(ids) for ids in responses] if decode else None,
        prompt_ids=padded(prompts, left=True),
        prompt_mask=padded(asked, fill=False, left=True),
        response_ids=padded(responses),
        ended=np.array([ids[-1] in ending for ids in responses]) if ending else None,
        beta=_beta(tokens, mask, config),
        policy_version=found.version,
        **named,
    )


def _scores(lists: Lists) -> Array:
    """[B] where every response is scored once, wherever veRL put the number; [B, T] where tokens are."""
    if all(np.count_nonzero(row) <= 1 for row in lists):
        return np.array([row.sum() for row in lists])
    return padded(lists)


def _beta(tokens: Mapping[str, Lists], mask: Lists, config: Any) -> float | None:
    """Reward per nat that this step was charged: score - reward = beta * KL, solved by least squares."""
    if not setting(config, "algorithm.use_kl_in_reward", default=False):
        return _loss_beta(config)
    fixed = setting(config, "algorithm.kl_ctrl.type", default="fixed") == "fixed"
    known_beta = float(setting(config, "algorithm.kl_ctrl.kl_coef", default=np.nan)) if fixed else None
    needed = ("rm_scores", "token_level_rewards", "old_log_probs", "ref_log_prob")
    if not all(name in tokens for name in needed):
        return known_beta
    scores, rewards, old, reference = (
        np.concatenate([row[here] for row, here in zip(tokens[name], mask, strict=True)]).astype(np.float64)
        for name in needed
    )
    kl = _penalty(old - reference, _estimator(config, "algorithm.kl_penalty", "kl"))
    if kl is None or not (kl @ kl) > 1e-12:
        return known_beta
    return float((scores - rewards) @ kl / (kl @ kl))


def _loss_beta(config: Any) -> float | None:
    actor = "actor_rollout_ref.actor"
    if not setting(config, f"{actor}.use_kl_loss", default=False):
        return None
    return float(setting(config, f"{actor}.kl_loss_coef", default=np.nan))


def _penalty(ratio: Array, estimator: str) -> Array | None:
    """veRL's per-token KL of log pi_old - log pi_ref; None for an estimator that the ratio alone does not give."""
    if estimator == "k1":
        return ratio
    if estimator == "abs":
        return np.abs(ratio)
    if estimator == "k2":
        return np.asarray(np.square(ratio) / 2)
    if estimator == "k3":
        held = np.clip(-ratio, -20, 20)
        return np.asarray(np.clip(np.exp(held) - held - 1, -10, 10))
    return None


def _estimator(config: Any, path: str, default: str) -> str:
    """As a trace names it. `k3+` has k3's value and k2's gradient, and in a loss the gradient is what counts."""
    given = str(setting(config, path, default=default))
    if given.endswith("+") and path.endswith("kl_loss_type"):
        return "k2"
    return ESTIMATORS.get(given.removesuffix("+"), "unknown")


def conventions_of(config: Any) -> Conventions:
    """What the numbers of a run with this configuration mean."""
    actor = "actor_rollout_ref.actor"
    method = str(setting(config, "algorithm.adv_estimator", default="gae"))
    in_reward = bool(setting(config, "algorithm.use_kl_in_reward", default=False))
    in_loss = bool(setting(config, f"{actor}.use_kl_loss", default=False))
    path, default = ("algorithm.kl_penalty", "kl") if in_reward else (f"{actor}.kl_loss_type", "low_var_kl")
    clip = setting(config, f"{actor}.clip_ratio", default=0.2)
    prompts, minibatch = setting(config, "data.train_batch_size"), setting(config, f"{actor}.ppo_mini_batch_size")
    beta = _loss_beta(config) if in_loss and not in_reward else _reward_beta(config) if in_reward else None
    discounted = method in ("gae", "reinforce_plus_plus")  # the other estimators centre whole responses
    return Conventions(
        trainer=f"{versioned('veRL', 'verl')} {method}",
        gamma=float(setting(config, "algorithm.gamma", default=1.0)) if discounted else 1.0,
        lam=float(setting(config, "algorithm.lam", default=1.0)) if method == "gae" else 1.0,
        kl="reward" if in_reward else "loss" if in_loss else "none",
        kl_estimator=_estimator(config, path, default) if in_reward or in_loss else "unknown",
        kl_unit="per token",
        beta=np.nan if beta is None else beta,
        normalisation=_normalisation(config, method),
        epsilon=1e-6 if method.startswith("grpo") else 0.0,
        critic=method == "gae",
        scale_by=f"a KL loss of weight {_loss_beta(config)} beside the KL in the reward"
        if in_reward and in_loss
        else "",
        clip=(
            float(setting(config, f"{actor}.clip_ratio_low", default=clip)),
            float(setting(config, f"{actor}.clip_ratio_high", default=clip)),
        ),
        epochs=setting(config, f"{actor}.ppo_epochs"),
        minibatches=int(prompts) // int(minibatch) if prompts and minibatch else None,
        aggregation=AGGREGATIONS.get(str(setting(config, f"{actor}.loss_agg_mode", default="token-mean"))),
    )


def _normalisation(config: Any, method: str) -> str:
    if method in ("grpo", "grpo_vectorized"):
        divided = setting(config, "algorithm.norm_adv_by_std_in_grpo", default=True)
        return "group mean and deviation" if divided else "group mean"
    return NORMALISATIONS.get(method, "unknown")


def _reward_beta(config: Any) -> float | None:
    """Of a fixed controller; an adaptive one has a new one each step."""
    if setting(config, "algorithm.kl_ctrl.type", default="fixed") != "fixed":
        return None
    return float(setting(config, "algorithm.kl_ctrl.kl_coef", default=np.nan))


def settings_of(config: Any) -> dict[str, Any]:
    """The settings that a recipe has, too, in its words. The controller's target is not among them: another unit."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    in_reward = setting(config, "algorithm.use_kl_in_reward", default=False)
    adaptive = in_reward and setting(config, "algorithm.kl_ctrl.type", default="fixed") == "adaptive"
    return known(
        policy={
            "temperature": setting(config, f"{rollout}.temperature"),
            "samples_per_prompt": setting(config, f"{rollout}.n"),
            "max_new_tokens": setting(config, "data.max_response_length"),
            "prompts_per_step": setting(config, "data.train_batch_size"),
            "epochs": setting(config, f"{actor}.ppo_epochs"),
            "lr": setting(config, f"{actor}.optim.lr"),
            "kl": {
                "place": "reward" if in_reward else "loss" if _loss_beta(config) is not None else None,
                "beta": setting(config, "algorithm.kl_ctrl.kl_coef") if in_reward else _loss_beta(config),
                "mode": ("adaptive" if adaptive else "fixed") if in_reward else None,
            },
        }
    )


def _eos(tokenizer: Any) -> tuple[int, ...]:
    end = getattr(tokenizer, "eos_token_id", None)
    return () if end is None else (int(end),)


def _decoder(tokenizer: Any) -> Callable[[Array], str]:
    return lambda ids: str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
