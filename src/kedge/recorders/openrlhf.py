"""An OpenRLHF run recorded between `make_experience` and `compute_advantages_and_returns`, and after the latter.

Written against the published source of OpenRLHF/OpenRLHF and not run inside OpenRLHF:
`openrlhf/trainer/ppo_utils/experience_maker.py` and `openrlhf/trainer/ppo_trainer.py` (commit
db825a2483bfaf4257bf75f808018403760c1cb4), `openrlhf/trainer/ppo_utils/experience.py` (commit
12bb0364c9b15ba4e10c323f7d2be303ae033353), `length_penalty.py` (66cc1a11678da51dcc7166f22ee2777ef85b37a1),
`samples_generator.py` (03912e47ef6c77d1a9f87fcd186218a28d2b0098) and, for the names of the options, the parser of
`openrlhf/cli/train_ppo_ray.py`; options are read under their dotted names and under the older flat ones.

Why in between: `compute_advantages_and_returns` sets `kl` to None and adds length penalties to the rewards in place.
The reference's log-probabilities are gone even before, unless the KL is in the loss. With the k1 estimator they are
log pi - kl, held within 10 nats of log pi as OpenRLHF holds its KL; k2 and k3 cannot be undone, and the column is then
absent. OpenRLHF logs its KL, and aims its controller, as a mean over tokens.
Dimensions: B responses, S tokens of prompt and response; token fields are [B, S - 1], entry t being about token t + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.recorders.guarded import Guarded
from kedge.recorders.settings import known, setting, versioned
from kedge.trace.foreign import Conventions, Rows, padded, to_array
from kedge.trace.writer import TextMode

Array = NDArray[Any]

NORMALISATIONS = {  # of the advantage, and whether the KL is centred with the scores or comes after
    "gae": "batch",
    "reinforce": "batch",
    "rloo": "leave one out",
    "reinforce_baseline": "group mean and batch",
    "dr_grpo": "group mean",
    "group_norm": "group mean and deviation",
}
WHOLE = ("gae", "reinforce")  # estimators whose score is clipped before anything is taken from it
TOKEN_FIELDS = {
    "action_log_probs": "old_logprob",
    "rollout_log_probs": "behaviour_logprob",
    "values": "values",
    "advantages": "advantage",
}


def recording(
    maker_class: type,
    out: Path | str,
    *,
    name: str | None = None,
    text: TextMode = "full",
    keep: int = 0,
    resume: bool = False,
) -> type:
    """A subclass of OpenRLHF's `RemoteExperienceMaker` that leaves a trace in `out`.

    `out` should be absolute: the trainer runs in a Ray process whose folder is another one. The maker does not know
    the trainer's step, so steps are counted from 0, with `resume` from the last one on disk. `text`, `keep`, `name` and
    `resume` are those of `kedge.trace.recorder.Recorder`. The class's `recorder` may be closed when the training is
    over; else the end of the process does it.
    """
    guarded = Guarded(out, name=name, text=text, keep=keep, resume=resume)

    class Recording(maker_class):  # type: ignore[misc]
        """OpenRLHF's experience maker, with a trace of what it makes."""

        recorder = guarded
        _step: int | None = None

        def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
            """What OpenRLHF computes, recorded."""
            before = [Before.of(experience) for experience in experiences]
            beta = max(0.0, float(self.kl_ctl.value))
            done: list[Any] = super().compute_advantages_and_returns(experiences)
            self._step = guarded.next_step if self._step is None else self._step + 1
            decode = None if text == "none" else _decoder(self.tokenizer)
            guarded.step(
                lambda: rows_of(done, before, self.args, step=int(self._step or 0), beta=beta, decode=decode),
                lambda: conventions_of(self.args),
                lambda: settings_of(self.args),
            )
            return done

    Recording.__name__, Recording.__qualname__ = maker_class.__name__, maker_class.__qualname__
    return Recording


@dataclass(frozen=True)
class Before:
    """What is lost or changed while advantages are computed."""

    kl: Array  # [b, S - 1], as the reward is charged; zeros where it is not
    reference: Array | None  # [b, S - 1] nats, kept only where the KL is in the loss
    rewards: Array  # [b] before length penalties

    @classmethod
    def of(cls, experience: Any) -> Before:
        """Of one micro-batch; what is changed in place is copied."""
        reference = experience.base_action_log_probs
        return cls(
            to_array(experience.kl),
            None if reference is None else to_array(reference),
            np.array(to_array(experience.rewards), dtype=np.float64),
        )


def rows_of(
    experiences: Sequence[Any],
    before: Sequence[Before],
    args: Any,
    *,
    step: int,
    beta: float,
    decode: Callable[[Array], str] | None = None,
) -> Rows | None:
    """The step as the trace wants it, or None where no response holds a token of the policy.

    Micro-batches are joined and put back in the order of their prompts; responses without a token of the policy are
    left out.
    """
    found = [
        row for experience, held in zip(experiences, before, strict=True) for row in _split(experience, held, args)
    ]
    found = sorted((row for row in found if row.mask.any()), key=lambda row: row.index)
    if not found:
        return None
    masks = [row.mask for row in found]
    scores, penalties = _scores(found, args)
    answers = int(setting(args, "rollout.n_samples_per_prompt", "n_samples_per_prompt", default=1))
    names = [name for name in found[0].tokens if all(name in row.tokens for row in found)]
    ended = [row.ended for row in found]
    named: dict[str, Any] = {name: padded([row.tokens[name] for row in found]) for name in names}
    asked: list[Any] = [np.ones(len(row.prompt), dtype=bool) for row in found]
    return Rows(
        step=step,
        response_mask=padded(masks, fill=False),
        scores={"score": scores} if penalties is None else {"score": scores, "length_penalty": penalties},
        group=np.array([row.index // answers for row in found]),
        prompts=[decode(row.prompt) for row in found] if decode else None,
        responses=[decode(row.response) for row in found] if decode else None,
        prompt_ids=padded([row.prompt for row in found], left=True),
        prompt_mask=padded(asked, fill=False, left=True),
        response_ids=padded([row.response for row in found]),
        ended=None if any(end is None for end in ended) else np.array(ended, dtype=bool),
        beta=beta if conventions_of(args).kl in ("reward", "loss") else None,
        **named,
    )


@dataclass(frozen=True)
class _Row:
    """One response, from its first token through the last of the policy."""

    index: int  # place in the batch as it was sampled
    prompt: Any  # token ids
    response: Any  # token ids
    mask: Any  # bool
    tokens: dict[str, Any]  # names of `Rows` -> one number a token
    score: float  # before length penalties
    total: float  # after them
    ended: bool | None


def _split(experience: Any, before: Before, args: Any) -> list[_Row]:
    sequences, attention = to_array(experience.sequences), to_array(experience.attention_mask).astype(bool)
    actions = to_array(experience.action_mask).astype(bool)
    given = {ours: getattr(experience, theirs, None) for theirs, ours in TOKEN_FIELDS.items()}
    tokens = {name: to_array(values) for name, values in given.items() if values is not None}
    reference = _reference(tokens.get("old_logprob"), before, args)
    if reference is not None:
        tokens["reference_logprob"] = reference
    total = to_array(experience.rewards).astype(np.float64)
    ended = _ended(experience, len(sequences))
    rows = []
    for row, action in enumerate(actions):
        first = int(action.argmax())
        stop = len(action) - int(action[::-1].argmax()) if action.any() else first
        rows.append(
            _Row(
                index=int(experience.index[row]),
                prompt=sequences[row, : first + 1][attention[row, : first + 1]],
                response=sequences[row, first + 1 : stop + 1],
                mask=action[first:stop],
                tokens={name: values[row, first:stop] for name, values in tokens.items()},
                score=float(before.rewards[row]),
                total=float(total[row]),
                ended=None if ended is None else bool(ended[row]),
            )
        )
    return rows


def _reference(old: Array | None, before: Before, args: Any) -> Array | None:
    """[b, S - 1] log-probabilities under the reference, where they are kept or can be told."""
    if before.reference is not None:
        return before.reference
    charged = conventions_of(args)
    if old is None or charged.kl != "reward" or charged.kl_estimator != "k1":
        return None
    return np.asarray(old.astype(np.float64) - before.kl)


def _ended(experience: Any, count: int) -> Array | None:
    """[b] not cut short by the sampler's budget, nor by the context window."""
    truncated = getattr(experience, "truncated", None)
    clipped = (getattr(experience, "info", None) or {}).get("response_clip_ratio")
    known_of = [to_array(flag).reshape(count).astype(bool) for flag in (truncated, clipped) if flag is not None]
    return ~np.logical_or.reduce(known_of) if known_of else None


def _scores(rows: Sequence[_Row], args: Any) -> tuple[Array, Array | None]:
    """[B] scores and, where a length penalty is set, [B] what it adds.

    OpenRLHF clips a reward after the baseline is taken; without one that is the score, clipped here, too.
    """
    scores, totals = np.array([row.score for row in rows]), np.array([row.total for row in rows])
    limits = setting(args, "reward.clip_range", "reward_clip_range")
    if limits and _estimator(args) in WHOLE:
        scores, totals = (np.clip(values, float(limits[0]), float(limits[1])) for values in (scores, totals))
    penalised = any(
        setting(args, f"reward.{option}", option) is not None
        for option in ("overlong_buffer_len", "stop_properly_penalty_coef")
    )
    return scores, totals - scores if penalised else None


def _estimator(args: Any) -> str:
    return str(setting(args, "algo.advantage.estimator", "advantage_estimator", default="gae"))


def _beta(args: Any) -> float:
    return float(setting(args, "algo.kl.init_coef", "init_kl_coef", default=0.0))


def conventions_of(args: Any) -> Conventions:
    """What the numbers of a run with these options mean."""
    method, start = _estimator(args), _beta(args)
    in_loss = bool(setting(args, "algo.kl.use_loss", "use_kl_loss", default=False))
    moving = setting(args, "algo.kl.target", "kl_target")
    discounted = method in WHOLE
    low_high = setting(args, "actor.eps_clip_low_high", "eps_clip_low_high")
    clip = setting(args, "actor.eps_clip", "eps_clip", default=0.2)
    rollout, batch = (
        setting(args, f"{section}.batch_size", f"{section}_batch_size") for section in ("rollout", "train")
    )
    answers = int(setting(args, "rollout.n_samples_per_prompt", "n_samples_per_prompt", default=1))
    charged = start > 0
    return Conventions(
        trainer=f"{versioned('OpenRLHF', 'openrlhf')} {method}",
        gamma=float(setting(args, "algo.advantage.gamma", "gamma", default=1.0)) if discounted else 1.0,
        lam=float(setting(args, "algo.advantage.lambd", "lambd", default=1.0)) if method == "gae" else 1.0,
        kl=("loss" if in_loss else "reward") if charged else "none",
        kl_estimator=str(setting(args, "algo.kl.estimator", "kl_estimator", default="k1")) if charged else "unknown",
        kl_unit="per token",
        beta=np.nan if moving else start,
        normalisation=NORMALISATIONS.get(method, "unknown"),
        epsilon=1e-9 if method == "group_norm" else 0.0,
        kl_credit="response" if discounted or not charged or in_loss else "to go",
        critic=method == "gae",
        clip=(float(low_high[0]), float(low_high[1])) if low_high else (float(clip), float(clip)),
        epochs=setting(args, "train.max_epochs", "max_epochs"),
        minibatches=max(1, int(rollout) * answers // int(batch)) if rollout and batch else None,
        aggregation="token_mean",
    )


def settings_of(args: Any) -> dict[str, Any]:
    """The options that a recipe has, too, in its words. The controller's target is not among them: another unit."""
    charged = conventions_of(args).kl
    return known(
        policy={
            "temperature": setting(args, "rollout.temperature", "temperature"),
            "samples_per_prompt": setting(args, "rollout.n_samples_per_prompt", "n_samples_per_prompt"),
            "max_new_tokens": setting(args, "rollout.max_new_tokens", "generate_max_len"),
            "prompts_per_step": setting(args, "rollout.batch_size", "rollout_batch_size"),
            "epochs": setting(args, "train.max_epochs", "max_epochs"),
            "lr": setting(args, "actor.adam.lr", "actor_learning_rate"),
            "critic_lr": setting(args, "critic.adam.lr", "critic_learning_rate"),
            "kl": {
                "place": charged if charged in ("reward", "loss") else None,
                "beta": _beta(args) if charged in ("reward", "loss") else None,
                "mode": "adaptive" if setting(args, "algo.kl.target", "kl_target") else "fixed",
            },
        }
    )


def _decoder(tokenizer: Any) -> Callable[[Array], str]:
    return lambda ids: str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
