"""Recording TRL's GRPO and RLOO trainers.

A *batch* is what is generated at once and then goes through the loss in pieces, shuffled, once per iteration. Rows
carry their number along (`kedge_row`), so that what the loss sees finds its row again. A batch is written when the next
one begins. B responses, T response tokens, F reward functions, L rows of a piece.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kedge.errors import InputError, Problem
from kedge.recorders.answers import Answers, evaluating, left_padded, right_padded, until_end
from kedge.trace.foreign import Conventions, Rows
from kedge.trace.recorder import Recorder

Array = NDArray[Any]
_Trainer: Any = object  # the class that `recording` makes has TRL's trainer in its place
ROW = "kedge_row"
_EPSILON = 1e-4  # TRL adds it to the deviation of a group or batch
_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # losses with PPO's clip
_AGGREGATION = {
    **dict.fromkeys(("grpo", "sapo"), "sequence_mean"),
    **dict.fromkeys(("bnpo", "dapo", "cispo", "vespo"), "token_mean"),
    "dr_grpo": "constant",
    "luspo": "sequence_sum",
}


@dataclass
class _Batch:
    """A generation batch on its way through the loss. Tensors stay where the trainer has them."""

    step: int
    beta: float
    prompts: Sequence[str] = ()
    responses: Sequence[str] = ()
    ended: list[bool] = field(default_factory=list)
    rewards: Tensor | None = None  # [B, F]
    logps: list[Tensor] = field(default_factory=list)  # [B, T] each, in the order in which generation asked for them
    output: dict[str, Any] = field(default_factory=dict)
    first: Tensor | None = None  # [B, T] log-probabilities as the loss saw them first, nan where it has not
    last: Tensor | None = None  # [B, T] the same, last
    entropy: Tensor | None = None  # [B, T] nats, first
    rows_seen: int = 0  # by the loss, every iteration counted

    @property
    def complete(self) -> bool:
        """Whether the loss has seen all rows; where training ended in the middle of a batch it has not."""
        return self.first is not None and self.rows_seen >= len(self.first)

    def seen(self, rows: Tensor, logps: Tensor, entropies: Tensor | None) -> None:
        """What the loss makes of some rows [L] of the batch."""
        if self.first is None or self.last is None:
            shape = self.output["completion_ids"].shape
            self.first, self.last = (torch.full(shape, math.nan, device=logps.device) for _ in range(2))
            self.entropy = torch.full(shape, math.nan, device=logps.device) if entropies is not None else None
        self.rows_seen += len(rows)
        self.last[rows] = logps.float()
        if self.rows_seen > len(self.first):  # a later iteration
            return
        self.first[rows] = logps.float()
        if entropies is not None and self.entropy is not None:
            self.entropy[rows] = entropies.float()


class RecordedGroups(_Trainer):  # type: ignore[misc]
    """Put before GRPOTrainer or RLOOTrainer in a class's bases; `kedge.recorders.trl.recording` makes that class."""

    kedge_settings: Any
    kedge_base: type[Any]
    kedge_seconds = 0.0  # spent in the recorder so far, answers for samples not included

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's, with a trace."""
        self._kedge_answers = self._kedge_prompts() if self.kedge_settings.samples_every else None
        main, settings = self.accelerator.is_main_process, self.kedge_settings
        self._kedge_recorder = None
        if main:
            self._kedge_recorder = Recorder(
                settings.out,
                conventions(self),
                name=settings.name,
                text=settings.text,
                keep=settings.keep,
                settings=told(self),
                resume=settings.resume,
            )
        self._kedge_phase = ""
        self._kedge_batch: _Batch | None = None
        self._kedge_rows: Tensor | None = None
        self._kedge_next: int | None = None
        try:
            result = super().train(*args, **kwargs)
            self._kedge_finish()
            self._kedge_look(last=True)
        except BaseException as error:
            if self._kedge_recorder is not None:
                self._kedge_recorder.__exit__(type(error), error, error.__traceback__)
            raise
        finally:
            self._kedge_phase = ""
        if self._kedge_recorder is not None:
            self._kedge_recorder.close()
        return result

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._kedge_on():
            plain: dict[str, Any] = super()._generate_and_score_completions(inputs)
            return plain
        self._kedge_finish()
        if self._kedge_next is None:
            self._kedge_next = self._kedge_first()
        self._kedge_look()
        batch = self._kedge_batch = _Batch(self._kedge_next, float(self.beta))
        self._kedge_next += 1
        self._kedge_phase = "generation"
        try:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        finally:
            self._kedge_phase = "loss"
        batch.output = dict(output)
        rows = torch.arange(len(output["completion_ids"]), device=output["completion_ids"].device)
        return {**output, ROW: rows}

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any, *rest: Any, **more: Any
    ) -> Any:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list, *rest, **more)
        batch = getattr(self, "_kedge_batch", None)
        if batch is not None and self._kedge_phase == "generation":
            mine = self.accelerator.process_index * len(prompts)
            batch.rewards = rewards[mine : mine + len(prompts)].detach().clone()
            batch.prompts, batch.responses = [as_text(one) for one in prompts], [as_text(one) for one in completions]
            ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
            batch.ended = [bool(len(ids)) and int(ids[-1]) in ends for ids in completion_ids_list]
        return rewards

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        batch = getattr(self, "_kedge_batch", None)
        if batch is not None and self._kedge_phase == "generation":
            batch.logps.append(found[0].detach())
        elif batch is not None and self._kedge_rows is not None:
            began = time.perf_counter()
            batch.seen(self._kedge_rows, found[0].detach(), None if found[1] is None else found[1].detach())
            self.kedge_seconds += time.perf_counter() - began
        return found

    def _compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        self._kedge_rows = inputs.get(ROW) if self._kedge_on() and self._kedge_phase == "loss" else None
        try:
            return super()._compute_loss(model, inputs, *rest, **more)
        finally:
            self._kedge_rows = None

    def _kedge_on(self) -> bool:
        return hasattr(self, "_kedge_phase") and bool(self.model.training)

    def _kedge_first(self) -> int:
        """Number of the first batch: that of a run which goes on from a checkpoint follows from its updates."""
        every = int(self.args.steps_per_generation * self.num_iterations)
        return math.ceil(int(self.state.global_step) * int(self.args.gradient_accumulation_steps) / every)

    def _kedge_finish(self) -> None:
        """Hand the batch that went through the loss to the recorder; of several processes the main one has them all."""
        batch, self._kedge_batch = self._kedge_batch, None
        if batch is None:
            return
        began = time.perf_counter()
        parts = [_columns(self, batch)]
        if self.accelerator.num_processes > 1:
            parts = _of_module(self, "gather_object")(parts)
        if self._kedge_recorder is not None and all(part is not None for part in parts):
            rows, metrics = _rows(self, batch, [part for part in parts if part is not None])
            self._kedge_recorder.step(rows, **metrics)
        self.kedge_seconds += time.perf_counter() - began

    def _kedge_look(self, *, last: bool = False) -> None:
        """Answers of policy and reference, where they are due."""
        step = self._kedge_next
        if self._kedge_answers is None or step is None or (step % self.kedge_settings.samples_every and not last):
            return
        phase, self._kedge_phase = self._kedge_phase, "answers"
        try:
            record = self._kedge_answers.look(_Source(self), step)
        finally:
            self._kedge_phase = phase
        if self._kedge_recorder is not None:
            self._kedge_recorder.samples(record)

    def _kedge_prompts(self) -> Answers:
        for name in ("tools", "environment_factories", "rollout_func"):
            if getattr(self, name, None):
                what = f"answers cannot be sampled where the trainer has `{name}`"
                raise InputError(Problem("samples_every", what, "leave samples_every at 0"))
        data = self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        if isinstance(data, Mapping):
            data = next(iter(data.values()))
        rows: dict[str, dict[str, Any]] = {}
        for row in data:
            rows.setdefault(as_text(row["prompt"]), row)
            if len(rows) == self.kedge_settings.samples:
                break
        self._kedge_inputs = list(rows.values())
        ids, images, _ = self._tokenize_prompts([row["prompt"] for row in self._kedge_inputs])
        if images is not None:
            raise InputError(
                Problem("samples_every", "answers to images cannot be sampled", "leave samples_every at 0")
            )
        return Answers([list(one) for one in ids], list(rows))

    def _kedge_score(self, responses: Sequence[Sequence[int]]) -> Array:
        """[N] weighted reward of responses to the prompts of the samples. Leaves no trace in the trainer's logs."""
        inputs = [dict(row) for row in self._kedge_inputs]
        prompts = [row["prompt"] for row in inputs]
        texts = self.processing_class.batch_decode(responses, skip_special_tokens=True)
        talk = not isinstance(prompts[0], str)
        completions = [[{"role": "assistant", "content": text}] if talk else text for text in texts]
        pending = {name: dict(getattr(self, name)) for name in ("_pending_extra_logs", "_pending_metrics")}
        found = super()._calculate_rewards(inputs, prompts, completions, [list(one) for one in responses])
        for name, before in pending.items():
            getattr(self, name).clear()
            getattr(self, name).update(before)
        weighted = (found[: len(prompts)] * self.reward_weights.to(found.device)).nansum(dim=1)
        return np.asarray(weighted.cpu().numpy())


class _Source:
    """A trainer as `Answers` asks it."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._pad = trainer._tokenizer.pad_token_id

    @contextmanager
    def _model(self, *, reference: bool, generating: bool) -> Iterator[Any | None]:
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        with evaluating(model):
            if reference and getattr(trainer, "ref_model", None) is not None:
                yield trainer.ref_model
            elif reference and trainer.beta and hasattr(model, "disable_adapter"):
                use = _of_module(trainer, "use_adapter")
                with use(model, adapter_name="ref" if "ref" in model.peft_config else None):
                    yield model
            elif reference:
                yield None
            elif generating:
                unwrap = _of_module(trainer, "unwrap_model_for_generation")
                with unwrap(trainer.model_wrapped, trainer.accelerator) as unwrapped:
                    yield unwrapped
            else:
                yield trainer.model

    def generate(self, prompts: Sequence[Sequence[int]], *, reference: bool) -> list[list[int]] | None:
        """Sampled with the trainer's settings."""
        trainer = self._trainer
        with self._model(reference=reference, generating=True) as model:
            if model is None:
                return None
            ids, mask = left_padded(prompts, self._pad, trainer.accelerator.device)
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=_sampling(trainer))
        return until_end(out[:, ids.shape[1] :], trainer.eos_token_ids)

    def logprobs(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, reference: bool
    ) -> list[Array] | None:
        """By the trainer's own function, so with its temperature."""
        trainer = self._trainer
        with self._model(reference=reference, generating=False) as model:
            if model is None:
                return None
            left, left_mask = left_padded(prompts, self._pad, trainer.accelerator.device)
            right, right_mask = right_padded(responses, self._pad, trainer.accelerator.device)
            found = trainer._get_per_token_logps_and_entropies(
                model,
                torch.cat([left, right], dim=1),
                torch.cat([left_mask, right_mask], dim=1),
                right.shape[1],
                batch_size=trainer.args.per_device_train_batch_size,
            )[0]
        array = found.float().cpu().numpy()
        return [array[row, : len(ids)] for row, ids in enumerate(responses)]

    def scores(self, responses: Sequence[Sequence[int]]) -> Array:
        """Weighted sum of the reward functions."""
        found: Array = self._trainer._kedge_score(responses)
        return found

    def texts(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """Without special tokens."""
        found: list[str] = self._trainer.processing_class.batch_decode(responses, skip_special_tokens=True)
        return found

    def tokens(self, response: Sequence[int]) -> list[str]:
        """As the tokenizer writes them."""
        return [str(token) for token in self._trainer._tokenizer.convert_ids_to_tokens(list(response))]


def _sampling(trainer: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=trainer.max_completion_length,
        do_sample=True,
        temperature=trainer.temperature,
        top_p=trainer.top_p,
        top_k=trainer.top_k,
        min_p=trainer.min_p,
        repetition_penalty=trainer.repetition_penalty,
        pad_token_id=trainer._tokenizer.pad_token_id,
        bos_token_id=trainer._tokenizer.bos_token_id,
        eos_token_id=trainer.eos_token_ids,
        disable_compile=True,
    )


def as_text(prompt: Any) -> str:
    """A prompt or completion as text; of messages, role and content of each."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{one['role']}: {_content(one.get('content'))}" for one in prompt)


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", f"[{part.get('type')}]")) for part in content or ())


def _of_module(trainer: Any, name: str) -> Any:
    """What the trainer's module calls by this name."""
    return vars(sys.modules[trainer.kedge_base.__module__])[name]


def grpo(trainer: Any) -> bool:
    """Whether the trainer is GRPO and not RLOO."""
    return bool(trainer.kedge_base.__name__ == "GRPOTrainer")


def conventions(trainer: Any) -> Conventions:
    """What the trainer's numbers mean, from its arguments."""
    args, about = trainer.args, trainer.kedge_settings
    shared: dict[str, Any] = {
        "kl_unit": "per token",  # the metric `kl` is a mean over tokens in both trainers
        "critic": False,
        "epochs": int(trainer.num_iterations),
        "minibatches": max(1, args.steps_per_generation // args.gradient_accumulation_steps),
    }
    if not grpo(trainer):
        return Conventions(
            trainer=f"trl {about.version} RLOO",
            kl="reward" if trainer.beta else "none",
            kl_estimator="k1",
            kl_credit="response",
            beta=float(trainer.beta),
            normalisation="leave one out and batch" if trainer.normalize_advantages else "leave one out",
            epsilon=_EPSILON if trainer.normalize_advantages else 0.0,
            clip=(float(trainer.epsilon_low), float(trainer.epsilon_high)),
            aggregation="sequence_sum",  # the ratio is that of the response, so its gradient sums over tokens
            scale_by="" if not trainer.reward_clip_range else f"rewards held within {tuple(trainer.reward_clip_range)}",
            **shared,
        )
    apart = trainer.multi_objective_aggregation == "normalize_then_sum"
    scaled = {"group": "group mean and deviation", "batch": "group mean and batch", "none": "group mean"}
    weighted = bool(args.use_bias_correction_kl)
    return Conventions(
        trainer=f"trl {about.version} GRPO",
        kl="loss" if trainer.beta else "none",
        kl_estimator="k3+" if weighted else "k3",
        beta=float(trainer.beta),
        normalisation="unknown" if apart else scaled[trainer.scale_rewards],
        epsilon=0.0 if apart or trainer.scale_rewards == "none" else _EPSILON,
        clip=(float(trainer.epsilon_low), float(trainer.epsilon_high)) if trainer.loss_type in _CLIPPED else None,
        aggregation=_AGGREGATION.get(trainer.loss_type),
        scale_by=f"loss {trainer.loss_type}" + ("; each reward normalised by itself" if apart else ""),
        **shared,
    )


def told(trainer: Any) -> dict[str, Any]:
    """The arguments as a recipe would name them."""
    args = trainer.args
    return {
        "policy": {
            "method": "grpo" if grpo(trainer) else "rloo",
            "lr": float(args.learning_rate),
            "samples_per_prompt": int(trainer.num_generations),
            "kl": {"beta": float(trainer.beta), "place": "loss" if grpo(trainer) else "reward"},
        }
    }


def _columns(trainer: Any, batch: _Batch) -> dict[str, Any] | None:
    """The batch's columns as arrays, or None where the loss has not seen all of it."""
    out = batch.output
    if batch.rewards is None or batch.last is None or not batch.complete:
        return None
    old, reference = _old_and_reference(trainer, batch)
    mask = out["completion_mask"].bool()
    if "tool_mask" in out:
        mask = mask & out["tool_mask"].bool()
    columns: dict[str, Tensor | None] = {
        "prompt_ids": out["prompt_ids"],
        "prompt_mask": out["prompt_mask"].bool(),
        "response_ids": out["completion_ids"],
        "response_mask": mask,
        "rewards": batch.rewards,
        "advantage": out["advantages"],
        "old_logprob": old,
        "new_logprob": batch.last,
        "reference_logprob": reference,
        "behaviour_logprob": out.get("sampling_per_token_logps"),
        "entropy": batch.entropy,
        "active": active(trainer, old, batch.last, out["advantages"], mask),
    }
    arrays = {name: None if one is None else one.detach().cpu().numpy().copy() for name, one in columns.items()}
    return {**arrays, "ended": batch.ended, "prompts": list(batch.prompts), "responses": list(batch.responses)}


def _old_and_reference(trainer: Any, batch: _Batch) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities before the update and of the reference. GRPO that has none before takes the loss's first."""
    assert batch.first is not None
    if grpo(trainer):
        old = batch.output.get("old_per_token_logps")
        return batch.first if old is None else old.float(), batch.output.get("ref_per_token_logps")
    return batch.logps[0].float(), batch.logps[1] if len(batch.logps) > 1 else None


def active(trainer: Any, old: Tensor, new: Tensor, advantages: Tensor, mask: Tensor) -> Tensor | None:
    """[B, T] where the loss let the gradient through in the last iteration; None for losses without such a bound."""
    args = trainer.args
    moved = torch.where(mask, new - old, 0.0)
    sequence, most = True, None
    if grpo(trainer):
        loss = trainer.loss_type
        if loss == "cispo":
            return mask.clone()
        if loss not in _CLIPPED or trainer.top_entropy_quantile < 1 or trainer.off_policy_mask_threshold is not None:
            return None
        sequence, most = trainer.importance_sampling_level == "sequence", args.delta
        if sequence:
            moved = (moved.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).unsqueeze(1)
    else:
        moved = moved.sum(dim=1, keepdim=True)
    ratio, sign = moved.exp(), advantages.reshape(len(advantages), -1)
    held = ((ratio > 1 + trainer.epsilon_high) & (sign > 0)) | ((ratio < 1 - trainer.epsilon_low) & (sign < 0))
    if most is not None:
        held = held | ((ratio > most) & (sign < 0))
    passed: Tensor = mask & ~held.expand_as(mask)
    return passed


def _rows(trainer: Any, batch: _Batch, parts: Sequence[dict[str, Any]]) -> tuple[Rows, dict[str, float]]:
    """The rows of all processes, and metrics that rows do not tell."""
    columns = {
        name: _joined([part[name] for part in parts], left=name in ("prompt_ids", "prompt_mask")) for name in parts[0]
    }
    names = list(trainer.reward_func_names)
    chosen = trainer.kedge_settings.score
    if chosen is not None and chosen not in names:
        raise InputError(
            Problem(f"score={chosen!r}", f"is no reward function; there are {', '.join(names)}", "name one")
        )
    channels = ["score" if name == chosen else name for name in names]
    ended = np.array(columns["ended"], dtype=bool)
    metrics = {"length/ended": float(ended.mean())}
    group: Array = np.arange(len(ended)) // int(trainer.num_generations)
    if getattr(trainer, "mask_truncated_completions", False):
        # The trainer scores cut responses with their tokens masked: nothing is known of these, so they are left out.
        kept = columns["response_mask"].any(axis=1)
        columns = {name: _kept(column, kept) for name, column in columns.items()}
        group = group[kept]
    rewards = columns.pop("rewards").astype(np.float64)
    weights = trainer.reward_weights.detach().cpu().numpy().astype(float).tolist()
    bounds = getattr(trainer, "reward_clip_range", None)
    if bounds and len(names) == 1 and weights[0]:
        rewards = np.clip(rewards * weights[0], *bounds) / weights[0]
    return (
        Rows(
            step=batch.step,
            response_mask=columns.pop("response_mask"),
            scores={name: rewards[:, index] for index, name in enumerate(channels)},
            weights=dict(zip(channels, weights, strict=True)),
            group=group,
            ended=None if getattr(trainer, "mask_truncated_completions", False) else ended,
            beta=batch.beta,
            policy_version=batch.step,
            **{name: column for name, column in columns.items() if name != "ended"},
        ),
        metrics,
    )


def _kept(column: Any, kept: Array) -> Any:
    if column is None:
        return None
    if isinstance(column, list):
        return [one for one, here in zip(column, kept, strict=True) if here]
    return column[kept]


def _joined(parts: list[Any], *, left: bool) -> Any:
    """Columns of several processes one below the other, padded to the same width."""
    if parts[0] is None or len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], list):
        return [one for part in parts for one in part]
    if parts[0].ndim < 2:
        return np.concatenate(parts)
    width = max(part.shape[1] for part in parts)

    def wide(part: Array) -> Array:
        more = (width - part.shape[1], 0) if left else (0, width - part.shape[1])
        return np.pad(part, [(0, 0), more])

    return np.concatenate([wide(part) for part in parts])
