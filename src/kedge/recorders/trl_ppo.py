"""Recording the PPO trainer of trl 1.12.0, `trl.experimental.ppo`.

Its `train` is one long function. It calls five functions of its module by name, and what they are given and return is
all that a trace needs; for the time of `train` each of them is replaced by itself with somebody who watches:

| function | tells |
| --- | --- |
| `batch_generation` | a new step begins: prompts, responses |
| `selective_log_softmax` | logits and log-probabilities of policy and reference in turn, then those of the update |
| `get_reward` | scores, or values where the value model is asked |
| `masked_whiten` | advantages before and after whitening, and the mask |
| `forward` | which rows a micro-batch of the update holds |

B responses, P prompt tokens, T response tokens, V words, M rows of a micro-batch.
"""

from __future__ import annotations

import inspect
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kedge.errors import InputError, Problem
from kedge.recorders.answers import Answers, evaluating, left_padded, until_end
from kedge.trace.foreign import Conventions, Rows
from kedge.trace.recorder import Recorder

Array = NDArray[Any]
_Trainer: Any = object  # the class that `recording` makes has TRL's trainer in its place


@dataclass
class _Step:
    """What is known of a policy step so far; tensors as the trainer computes them."""

    number: int
    query_responses: Tensor  # [B, P + T]
    context: int  # P
    logprobs: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))  # policy, reference
    eos: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    entropy: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    mask: Tensor | None = None  # [B, T] bool
    advantage: Tensor | None = None  # [B, T]
    pieces: deque[tuple[Tensor, Tensor]] = field(default_factory=deque)  # of the last epoch: rows, log-probabilities

    @property
    def chunks(self) -> int:
        """How many calls have told log-probabilities of the rollout."""
        return len(self.logprobs[0]) + len(self.logprobs[1])


class RecordedPPO(_Trainer):  # type: ignore[misc]
    """Put before PPOTrainer in a class's bases; `kedge.recorders.trl.recording` makes that class."""

    kedge_settings: Any
    kedge_base: type[Any]
    kedge_seconds = 0.0  # spent in the recorder so far, answers for samples not included

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's, with a trace."""
        settings = self.kedge_settings
        if self.accelerator.num_processes > 1:
            what = f"PPO is recorded in one process; there are {self.accelerator.num_processes}"
            raise InputError(Problem("recording(PPOTrainer)", what, "train without recording, or on one device"))
        self._kedge_step: _Step | None = None
        self._kedge_paused, self._kedge_next, self._kedge_rows = False, 0, None
        self._kedge_answers = self._kedge_prompts() if settings.samples_every else None
        self._kedge_recorder = Recorder(
            settings.out,
            conventions(self),
            name=settings.name,
            text=settings.text,
            keep=settings.keep,
            settings=told(self),
            resume=settings.resume,
        )
        with self._kedge_recorder, self._kedge_watching():
            result = super().train(*args, **kwargs)
            self._kedge_finish()
            self._kedge_look(last=True)
        return result

    def generate_completions(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; its samples are no part of a step."""
        self._kedge_paused = True
        try:
            return super().generate_completions(*args, **kwargs)
        finally:
            self._kedge_paused = False

    @contextmanager
    def _kedge_watching(self) -> Iterator[None]:
        space = vars(sys.modules[self.kedge_base.__module__])
        before = {name: space[name] for name in _WATCHERS}
        self._kedge_calls = before

        def watched(name: str) -> Callable[..., Any]:
            function, watch = before[name], _WATCHERS[name]
            signature = inspect.signature(function)

            def call(*args: Any, **kwargs: Any) -> Any:
                found = function(*args, **kwargs)
                if not self._kedge_paused:
                    began = time.perf_counter()
                    with torch.no_grad():
                        bound = signature.bind(*args, **kwargs)
                        bound.apply_defaults()
                        watch(self, found, bound.arguments)
                    self.kedge_seconds += time.perf_counter() - began
                return found

            return call

        space.update({name: watched(name) for name in _WATCHERS})
        try:
            yield
        finally:
            space.update(before)

    def _kedge_generated(self, found: Any, given: Mapping[str, Any]) -> None:
        self._kedge_finish()
        self._kedge_look()
        step = _Step(self._kedge_next, found[0].detach().clone(), given["queries"].shape[1])
        step.pieces = deque(maxlen=int(self.args.num_mini_batches) * int(self.args.gradient_accumulation_steps))
        self._kedge_step, self._kedge_rows = step, None
        self._kedge_next += 1

    def _kedge_log_probability(self, found: Tensor, given: Mapping[str, Any]) -> None:
        step = self._kedge_step
        if step is None:
            return
        if step.mask is not None:  # the update has begun
            if self._kedge_rows is not None:
                step.pieces.append((self._kedge_rows, found.detach().clone()))
            self._kedge_rows = None
            return
        which = step.chunks % 2
        eos, entropy = _ends_and_entropy(given["logits"], self.processing_class.eos_token_id)
        step.logprobs[which].append(found.detach().clone())
        step.eos[which].append(eos)
        if not which:
            step.entropy.append(entropy)

    def _kedge_rewarded(self, found: Any, given: Mapping[str, Any]) -> None:
        step = self._kedge_step
        if step is None or step.mask is not None:
            return
        if given["model"] is self.reward_model:
            step.scores.append(found[1].detach().clone())
        else:
            step.values.append(found[0][:, step.context - 1 : -1].squeeze(-1).detach().clone())

    def _kedge_whitened(self, found: Tensor, given: Mapping[str, Any]) -> None:
        if self._kedge_step is not None and given["shift_mean"]:  # rewards are whitened without a shift
            mask: Tensor = given["mask"]
            self._kedge_step.mask = mask.detach().clone()
            self._kedge_step.advantage = torch.where(mask, found, 0.0).detach()

    def _kedge_forward(self, _found: Any, given: Mapping[str, Any]) -> None:
        if self._kedge_step is not None and self._kedge_step.mask is not None:
            self._kedge_rows = given["query_responses"].detach().clone()

    def _kedge_finish(self) -> None:
        """Hand the step that is over to the recorder."""
        step, self._kedge_step = self._kedge_step, None
        if step is None or step.mask is None or step.advantage is None:
            return
        self._kedge_recorder.step(rows(self, step), **{"length/ended": float(_ended(self, step).float().mean())})

    def _kedge_look(self, *, last: bool = False) -> None:
        step = self._kedge_next
        if self._kedge_answers is None or (step % self.kedge_settings.samples_every and not last):
            return
        before, self._kedge_paused = self._kedge_paused, True
        try:
            self._kedge_recorder.samples(self._kedge_answers.look(_Source(self), step))
        finally:
            self._kedge_paused = before

    def _kedge_prompts(self) -> Answers:
        data = self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        found: dict[tuple[int, ...], None] = {}
        for row in data:
            found.setdefault(tuple(int(one) for one in row["input_ids"]))
            if len(found) == self.kedge_settings.samples:
                break
        prompts = [list(one) for one in found]
        return Answers(prompts, self.processing_class.batch_decode(prompts, skip_special_tokens=True))


_WATCHERS: dict[str, Callable[..., None]] = {
    "batch_generation": RecordedPPO._kedge_generated,
    "selective_log_softmax": RecordedPPO._kedge_log_probability,
    "get_reward": RecordedPPO._kedge_rewarded,
    "masked_whiten": RecordedPPO._kedge_whitened,
    "forward": RecordedPPO._kedge_forward,
}


class _Source:
    """A trainer as `Answers` asks it."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._pad = trainer.processing_class.pad_token_id

    @contextmanager
    def _model(self, *, reference: bool) -> Iterator[Any]:
        trainer = self._trainer
        policy = trainer.accelerator.unwrap_model(trainer.model).policy
        with evaluating(policy):
            if not reference:
                yield policy
            elif trainer.ref_model is not None:
                yield trainer.ref_model
            else:
                with trainer.null_ref_context():
                    yield policy

    def generate(self, prompts: Sequence[Sequence[int]], *, reference: bool) -> list[list[int]]:
        """Sampled as `train` samples."""
        from transformers import GenerationConfig

        trainer = self._trainer
        sampling = GenerationConfig(
            max_new_tokens=trainer.args.response_length,
            temperature=trainer.args.temperature + 1e-7,
            top_k=0,
            top_p=1.0,
            do_sample=True,
            eos_token_id=trainer.processing_class.eos_token_id,
            pad_token_id=self._pad,
        )
        with self._model(reference=reference) as model:
            ids, mask = left_padded(prompts, self._pad, trainer.accelerator.device)
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=sampling)
        return until_end(out[:, ids.shape[1] :], [trainer.processing_class.eos_token_id])

    def logprobs(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, reference: bool
    ) -> list[Array]:
        """At the sampling temperature."""
        trainer, found = self._trainer, []
        with self._model(reference=reference) as model:
            for prompt, response in zip(prompts, responses, strict=True):
                ids = torch.tensor([[*prompt, *response]], device=trainer.accelerator.device)
                logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
                logits /= trainer.args.temperature + 1e-7
                picked = logits.log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)
                found.append(picked.cpu().numpy())
        return found

    def scores(self, responses: Sequence[Sequence[int]]) -> Array:
        """Of the reward model, less what a missing end costs."""
        trainer = self._trainer
        get_reward = trainer._kedge_calls["get_reward"]
        prompts, ends, found = trainer._kedge_answers.prompts, trainer.processing_class.eos_token_id, []
        penalty = trainer.args.missing_eos_penalty or 0.0
        for prompt, response in zip(prompts, responses, strict=True):
            ids = torch.tensor([[*prompt, *response, self._pad]], device=trainer.accelerator.device)
            score = float(get_reward(trainer.reward_model, ids, self._pad, len(prompt))[1][0])
            found.append(score - (0.0 if response and response[-1] == ends else penalty))
        return np.array(found)

    def texts(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """Without special tokens."""
        found: list[str] = self._trainer.processing_class.batch_decode(responses, skip_special_tokens=True)
        return found

    def tokens(self, response: Sequence[int]) -> list[str]:
        """As the tokenizer writes them."""
        return [str(token) for token in self._trainer.processing_class.convert_ids_to_tokens(list(response))]


def conventions(trainer: Any) -> Conventions:
    """What the trainer's numbers mean, from its arguments."""
    args = trainer.args
    return Conventions(
        trainer=f"trl {trainer.kedge_settings.version} PPO",
        gamma=float(args.gamma),
        lam=float(args.lam),
        kl="reward" if args.kl_coef else "none",
        kl_estimator=str(args.kl_estimator),
        kl_unit="per sequence",  # objective/kl sums over tokens
        beta=float(args.kl_coef),
        score_position="after",
        normalisation="batch",
        critic=True,
        scale_by="token rewards divided by their deviation over the batch" if args.whiten_rewards else "",
        clip=(float(args.cliprange), float(args.cliprange)),
        epochs=int(args.num_ppo_epochs),
        minibatches=int(args.num_mini_batches),
        aggregation="token_mean",
    )


def told(trainer: Any) -> dict[str, Any]:
    """The arguments as a recipe would name them."""
    args = trainer.args
    policy: dict[str, Any] = {
        "method": "ppo",
        "lr": float(args.learning_rate),
        "kl": {"beta": float(args.kl_coef), "place": "reward", "estimator": str(args.kl_estimator)},
    }
    if args.missing_eos_penalty is not None:
        policy["missing_eos_penalty"] = float(args.missing_eos_penalty)
    return {"policy": policy}


def rows(trainer: Any, step: _Step) -> Rows:
    """The rows of a step, as wide as the trainer has them: TRL puts the score into the slot after a response."""
    assert step.mask is not None and step.advantage is not None
    tokenizer, args = trainer.processing_class, trainer.args
    queries, responses = step.query_responses[:, : step.context], step.query_responses[:, step.context :]
    mask, ended = step.mask, _ended(trainer, step)
    old, reference = (torch.cat(one) for one in step.logprobs)
    old_eos, reference_eos = (torch.cat(one) for one in step.eos)
    new = _new_logprobs(step, old)
    scores = {"score": torch.cat(step.scores)}
    if args.missing_eos_penalty is not None:
        scores["missing_eos"] = (~ended).float()
    after = torch.nn.functional.pad(mask[:, :-1], (1, 0), value=True)  # values reach to the slot after the end
    texts = torch.where(mask, responses, tokenizer.pad_token_id)
    return Rows(
        step=step.number,
        response_mask=_array(mask),
        scores={name: _array(one.float()) for name, one in scores.items()},
        weights={} if args.missing_eos_penalty is None else {"missing_eos": -float(args.missing_eos_penalty)},
        prompts=tokenizer.batch_decode(queries, skip_special_tokens=True),
        responses=tokenizer.batch_decode(texts, skip_special_tokens=True),
        prompt_ids=_array(queries),
        prompt_mask=_array(queries != tokenizer.pad_token_id),
        response_ids=_array(responses),
        ended=_array(ended),
        behaviour_logprob=_array(old),  # the logits that sampled are the ones the update compares with
        old_logprob=_array(old),
        reference_logprob=_array(reference),
        new_logprob=None if new is None else _array(new),
        old_eos_logprob=_array(old_eos),
        reference_eos_logprob=_array(reference_eos),
        entropy=_array(torch.cat(step.entropy)),
        active=None if new is None else _array(_active(old, new, step.advantage, mask, float(args.cliprange))),
        values=_array(torch.where(after, torch.cat(step.values), 0.0)),
        advantage=_array(step.advantage),
        beta=float(args.kl_coef),
        policy_version=step.number,
    )


def _ended(trainer: Any, step: _Step) -> Tensor:
    """[B] whether the end token is among the response's."""
    assert step.mask is not None
    ends = step.query_responses[:, step.context :] == trainer.processing_class.eos_token_id
    found: Tensor = (ends & step.mask).any(dim=1)
    return found


def _new_logprobs(step: _Step, old: Tensor) -> Tensor | None:
    """[B, T] of the last epoch. Rows are found by their tokens; of equal rows each takes the next place in turn."""
    if not step.pieces:
        return None
    places: dict[bytes, deque[int]] = {}
    for row, ids in enumerate(step.query_responses.cpu().numpy()):
        places.setdefault(ids.tobytes(), deque()).append(row)
    new = torch.full_like(old, math.nan)
    for pieces, found in step.pieces:
        for ids, logprobs in zip(pieces.cpu().numpy(), found, strict=True):
            waiting = places[ids.tobytes()]
            new[waiting[0]] = logprobs
            waiting.rotate(-1)
    return new


def _active(old: Tensor, new: Tensor, advantage: Tensor, mask: Tensor, clip: float) -> Tensor:
    """[B, T] where the clip let the gradient through in the last epoch."""
    ratio = torch.where(mask, new - old, 0.0).exp()
    held = ((ratio > 1 + clip) & (advantage > 0)) | ((ratio < 1 - clip) & (advantage < 0))
    return mask & ~held


def _ends_and_entropy(logits: Tensor, eos: int) -> tuple[Tensor, Tensor]:
    """[B, T] log-probability of EOS and entropy from logits [B, T, V], row by row so that little memory is taken."""
    ends, entropies = [], []
    for row in logits:
        logprobs = row.float().log_softmax(dim=-1)
        ends.append(logprobs[:, eos])
        entropies.append(-(logprobs.exp() * logprobs.clamp(min=torch.finfo(torch.float32).min)).sum(dim=-1))
    return torch.stack(ends), torch.stack(entropies)


def _array(tensor: Tensor) -> Array:
    found: Array = tensor.detach().cpu().numpy()
    return found
