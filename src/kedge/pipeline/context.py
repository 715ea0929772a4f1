"""What every stage works with: the recipe, the run's folder, and the task's texts as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kedge.data.records import Demonstration, Judgment, Loaded, Preference, Prompt, graded, prompt_text
from kedge.data.task import Task
from kedge.data.tokenise import decode, encode_prompt, encode_response
from kedge.models.load import disable_dropout, load_policy
from kedge.progress import Interrupt, Progress, Stage
from kedge.recipe import Recipe
from kedge.rollout.engine import TorchEngine
from kedge.rollout.given import as_prompts, as_rollouts
from kedge.rollout.rules import RuleReward
from kedge.structs import Judgments, Prompts, Rollouts, Sampling
from kedge.trace.jsonl import append_json
from kedge.trace.run_dir import RunDir
from kedge.train.schedule import seed_of

LOG_EVERY = 10  # optimiser steps


@dataclass(frozen=True)
class Context:
    """A run under way. `tokenizer` is the policy's; reward model and critic share it."""

    recipe: Recipe
    run: RunDir
    task: Task
    tokenizer: Any
    progress: Progress
    interrupt: Interrupt
    rules: Mapping[str, RuleReward] = field(default_factory=dict)
    until: int | None = None  # policy step after which the stage ends, if before the recipe's last

    @property
    def steps(self) -> int:
        """Policy steps to carry out; the recipe's own number is what learning rates fall over."""
        steps = self.recipe.policy.steps
        return steps if self.until is None else min(self.until, steps)

    @property
    def stream(self) -> int:
        """The seed of what is drawn in policy optimisation."""
        recipe = self.recipe
        return seed_of(recipe.seed, "branch", recipe.policy.branch) if recipe.policy.branch else recipe.seed

    def stream_of(self, returns: int) -> int:
        """The same after the recipe's guard went back so many times: each time other draws."""
        return seed_of(self.stream, "return", returns) if returns else self.stream

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def eos_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def engine(self) -> TorchEngine:
        return TorchEngine(self.eos_id, self.pad_id)

    @property
    def sampling(self) -> Sampling:
        """How the policy answers, in training and in evaluation."""
        return Sampling(self.recipe.policy.max_new_tokens, self.recipe.policy.temperature)

    def policy(self, folder: Path) -> Any:
        """The language model in a folder of this run, in eval mode without dropout."""
        return disable_dropout(load_policy(folder, trust_remote_code=self.recipe.model.trust_remote_code)[0])

    def metric(self, stage: str, step: int, figures: dict[str, float]) -> None:
        """One line of metrics.jsonl."""
        append_json(self.run.metrics, {"stage": stage, "step": step, **figures})

    def show(self, shown: Stage, step: int, loss: float) -> None:
        """After an optimiser step: stop if asked to, and show it."""
        self.interrupt.check(f"{shown.name} step {step}")
        shown.advance(step, loss=loss)

    def follow(self, shown: Stage, step: int, loss: float) -> None:
        """After an optimiser step of a supervised stage: show it, and keep every tenth."""
        self.show(shown, step, loss)
        if step % LOG_EVERY == 0 or step == shown.total - 1:
            self.metric(shown.name, step, {"loss": loss})

    def event(self, stage: str, step: int, event: str, message: str) -> None:
        """One line of events.jsonl, shown as well."""
        append_json(self.run.events, {"stage": stage, "step": step, "event": event, "message": message})
        self.progress.note(message)

    def encode_demonstrations(self, loaded: Loaded[Demonstration]) -> Rollouts:
        """Demonstrations as rollouts that ended."""
        return self.encode([row.prompt for row in loaded.rows], [row.response for row in loaded.rows])

    def fits(self, prompt: Prompt, response: str) -> bool:
        """Whether prompt and response are within the context, EOS included."""
        length = len(encode_prompt(self.tokenizer, prompt)) + len(encode_response(self.tokenizer, response))
        return length <= self.recipe.model.context

    def encode_judgments(self, rows: Sequence[Judgment], *, invented: int = 0) -> Judgments:
        """What annotators said, as token ids; `group_id` of a response numbers its prompt in the order first seen.

        The last `invented` rows are not theirs.
        """
        prompts: list[Prompt] = []
        responses: list[str] = []
        grades: list[tuple[float, ...]] = []
        for row in rows:
            judged, said = graded(row)
            prompts += [row.prompt] * len(judged)
            responses += judged
            grades.append(said)
        width = max(map(len, grades), default=0)
        counts = torch.tensor([len(said) for said in grades])
        place = torch.arange(width).expand(len(grades), width)
        index = (counts.cumsum(0) - counts).unsqueeze(1) + place
        held = place < counts.unsqueeze(1)
        padded = torch.tensor([[*said, *[0.0] * (width - len(said))] for said in grades])
        margin = torch.tensor([(row.margin or 0.0) if isinstance(row, Preference) else 0.0 for row in rows])
        texts = [prompt_text(prompt) for prompt in prompts]
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        group = torch.tensor([numbers[text] for text in texts])
        rollouts = replace(self.encode(prompts, responses), group_id=group)
        own = torch.arange(len(rows)) < len(rows) - invented
        return Judgments(rollouts, index.masked_fill(~held, -1), padded, margin, ~own if invented else None)

    def encode_prompts(self, prompts: Sequence[Prompt]) -> Prompts:
        """Prompts to answer; `group_id` numbers them in the order given."""
        return as_prompts([encode_prompt(self.tokenizer, prompt) for prompt in prompts], self.pad_id)

    def encode(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Rollouts:
        """Given responses as rollouts."""
        return as_rollouts(
            [encode_prompt(self.tokenizer, prompt) for prompt in prompts],
            [encode_response(self.tokenizer, response) for response in responses],
            self.pad_id,
        )

    def text(self, rollouts: Rollouts) -> list[str]:
        """Responses as text, special tokens left out."""
        rows = [ids[mask].tolist() for ids, mask in zip(rollouts.response_ids, rollouts.response_mask, strict=True)]
        return [decode(self.tokenizer, row) for row in rows]

    def pieces(self, ids: torch.Tensor) -> list[str]:
        """Each token as text of its own, for display."""
        return [self.tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids.tolist()]
