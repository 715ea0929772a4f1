"""Faults planted in runs of another library's trainers (TRL), and what `kedge diagnose` says of their recordings.

Runs in an environment that holds TRL and no training stack of Kedge (`make setup-trl`):

    .venv-trl/bin/python benchmarks/foreign_faults.py --out runs/foreign          # trl 1.16.0: GRPO and RLOO
    .venv-trl-ppo/bin/python benchmarks/foreign_faults.py --out runs/foreign      # trl 1.12.0: PPO
    python benchmarks/foreign_faults.py --out runs/foreign --page                 # the page in docs/results

A small transformer learns a made-up language and is then rewarded for different words that the asked tone likes
and for naming the topic. Nothing in the reward depends on length. Each run takes well under a minute of one core;
what is there already is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "foreign-faults"
TOPICS = ("tea", "rain", "ships", "bread", "glass", "wool", "salt", "clay")
TONES = ("kind", "plain", "proud", "quick")
WORDS = tuple(
    f"{first}{second}"
    for first in ("ba", "do", "ki", "lu", "me", "ro")
    for second in ("n", "ra", "st", "vi", "wo", "x")
)
COUNTED = 14  # words that the taste looks at; no answer of the language is briefer
ENDS = 0.25  # after each further word
BUDGET = 34  # tokens
SEEDS = (0, 1, 2)
EXPECTED = {
    "healthy": (),
    "beta": ("beta",),
    "length": ("length_reward",),
    "kl unit": ("controller",),
    "score unit": ("reward_unit", "unscaled_reward"),
    "cut": ("ending",),
}
METHODS = {
    "grpo": tuple(one for one in EXPECTED if one != "score unit"),
    "rloo": tuple(EXPECTED),
    "ppo": ("healthy", "beta"),
}


HEAD = """# Faults in runs of TRL

Made by `python benchmarks/foreign_faults.py --out runs/foreign` in two environments and then with `--page`; raw figures
are in `foreign-faults.json`. TRL trains, `kedge.recorders.trl` records, `kedge diagnose` reads; `kedge.train` is never
imported.

- Of {sick} runs with a planted fault the check that is expected fails in **{found}**; it is the first in {first}.
- Of {healthy} healthy runs **{quiet}** have no failing check, {silent} no warning either.
- From the rows of steps alone, without answers sampled beside the reference's (`samples_every=0`): {alone} of {sick}
  found, {quiet_alone} of {healthy} healthy ones quiet.
- The recorder took at most {share:.1%} of a run's time (answers for samples not included), a run at most {cpu:.0f} s of
  a core.

A transformer of one layer learns a made-up language and is then rewarded, over 70 steps of 48 responses (PPO: 64), for
words that the tone asked for likes and for naming the topic. Faults:

| fault | what is changed |
|--|--|
| beta | the KL coefficient is a tenth, from the start |
| length | 0.15 of the score's standard deviation for each token, from the start |
| kl unit | a controller of beta (Ziegler et al.), target 6 nats per response, reads the metric `kl`: nats per token |
| score unit | scores count five times from the middle of the run (RLOO alone: GRPO divides by the group's deviation) |
| cut | a budget of 20 tokens in the place of 34, and what it cuts off is scored as if it were complete |

How strong a fault is was chosen so that it has an effect within the run; one world, one model, short runs. `ending` and
`length_reward` were extended on earlier runs of GRPO, in a language with briefer answers: there one healthy run of
eight had a failing check, `exploit`, as one word made 47% of its gain. So the language was given longer answers; the
checks were not changed after that.

| trainer | fault | seed | expected | fails, likeliest first | first to fail | warns | fails, from rows alone |
|--|--|--|--|--|--|--|--|"""


@dataclass(frozen=True)
class Setting:
    """What a run is given; a fault changes one thing of it."""

    beta: float  # reward (GRPO: advantage) per nat
    lr: float
    steps: int = 70
    rows: int = 48
    budget: int = BUDGET
    cut_costs: float = 4.0  # reward
    per_token: float = 0.0  # reward
    rescaled_at: int | None = None  # step from which scores count five times
    target: float | None = None  # of a controller of beta that reads the trainer's own metric `kl`


SETTINGS = {
    "grpo": Setting(beta=0.3, lr=1e-3),
    "rloo": Setting(beta=0.3, lr=1e-3),
    "ppo": Setting(beta=0.2, lr=1e-3, rows=64),
}


def planted(setting: Setting, fault: str) -> Setting:
    """The setting with a fault."""
    return {
        "healthy": setting,
        "beta": replace(setting, beta=setting.beta / 10),
        "length": replace(setting, per_token=0.15),
        # A target of 6 nats per response, as in Ziegler et al., held against a metric in nats per token.
        "kl unit": replace(setting, target=6.0),
        "score unit": replace(setting, rescaled_at=setting.steps // 2),
        "cut": replace(setting, budget=20, cut_costs=0.0),
    }[fault]


class World:
    """A language with a successor table, and a reward for its texts."""

    def __init__(self) -> None:
        rng = np.random.default_rng(11)
        self.follows = {word: rng.choice(WORDS, size=8, replace=False) for word in ("^", *TOPICS, *WORDS)}
        self.likely = {word: rng.dirichlet(np.full(8, 2.0)) for word in self.follows}
        size = len(WORDS) + len(TOPICS)
        shared = rng.uniform(-1, 1, size=size)
        # Each tone has a taste of its own, so that no phrase pleases whatever is asked.
        self.taste = {
            tone: dict(zip((*WORDS, *TOPICS), shared + 0.7 * rng.uniform(-1, 1, size=size), strict=True))
            for tone in TONES
        }
        scores = [self._raw(prompt, self.answer(prompt, rng)) for prompt in self.prompts(400, 5)]
        self.mean, self.deviation = float(np.mean(scores)), float(np.std(scores))

    def prompts(self, count: int, seed: int) -> list[str]:
        """Distinct enough prompts."""
        rng = np.random.default_rng(seed)
        pick = rng.choice
        return [
            f"write about {pick(TOPICS)} in a {pick(TONES)} tone with {pick(WORDS)} or {pick(WORDS)} :"
            for _ in range(count)
        ]

    def answer(self, prompt: str, rng: np.random.Generator) -> str:
        """What the language says to a prompt."""
        topic, words, last = prompt.split()[2], [], "^"
        while len(words) < COUNTED or (len(words) < BUDGET - 2 and rng.random() >= ENDS):
            last = topic if rng.random() < 0.06 else str(rng.choice(self.follows[last], p=self.likely[last]))
            words.append(last)
        return " ".join(words)

    def _raw(self, prompt: str, text: str) -> float:
        words = text.split()[:COUNTED]
        asked = prompt.split()
        taste = self.taste[asked[5]]
        liked = sum(taste.get(word, 0.0) for word in sorted(set(words))) / COUNTED
        return liked + 0.3 * (asked[2] in words)

    def score(self, prompt: str, text: str) -> float:
        """In standard deviations of the language's own texts about their mean."""
        return (self._raw(prompt, text) - self.mean) / self.deviation


def prepare(folder: Path) -> None:
    """The supervised policy, and a reward model for PPO, as Hugging Face folders under `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from kedge.desk.world import word_tokenizer

    if (folder / "reward" / "config.json").exists():
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    world, rng = World(), np.random.default_rng(1)
    prompts = world.prompts(4000, 2)
    answers = [world.answer(prompt, rng) for prompt in prompts]
    tokenizer = word_tokenizer([f"{prompt} {answer}" for prompt, answer in zip(prompts, answers, strict=True)])
    size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        **size,
        **ids,
    )
    asked = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    said = [tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for answer in answers]
    policy = LlamaForCausalLM(config)

    def language(model: Any, picked: Sequence[int]) -> Any:
        inputs, start = _batch([asked[one] + said[one] for one in picked]), [len(asked[one]) for one in picked]
        labels = inputs.masked_fill(inputs == tokenizer.pad_token_id, -100)
        for row, length in enumerate(start):
            labels[row, :length] = -100
        return model(input_ids=inputs, attention_mask=(inputs != 0).long(), labels=labels).loss

    _train(policy, language, len(prompts), 400)
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    config.num_labels = 1
    judge = LlamaForSequenceClassification(config)
    judge.model.load_state_dict(policy.model.state_dict())
    targets = torch.tensor([world.score(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)])

    def regression(model: Any, picked: Sequence[int]) -> Any:
        inputs = _batch([asked[one] + said[one] for one in picked])
        found = model(input_ids=inputs, attention_mask=(inputs != 0).long()).logits[:, 0]
        return ((found - targets[torch.as_tensor(picked)]) ** 2).mean()

    _train(judge, regression, len(prompts), 400)
    judge.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")


def _batch(rows: Sequence[Sequence[int]]) -> Any:
    import torch

    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def _train(model: Any, loss_of: Callable[[Any, Sequence[int]], Any], count: int, steps: int) -> None:
    import torch

    rng, optimiser = np.random.default_rng(3), torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        loss = loss_of(model, rng.choice(count, size=48).tolist())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()


def run(out: Path, method: str, fault: str, seed: int) -> dict[str, float]:
    """One run, recorded: seconds of training, on the clock and of a core, and what of it the recorder took."""
    import torch
    import transformers
    from datasets import Dataset

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.set_seed(seed)
    setting = planted(SETTINGS[method], fault)
    task, world = out / "task", World()
    prompts = world.prompts(600, 100 + seed)
    folder = out / name_of(method, fault, seed)
    if method == "ppo":
        trainer = _ppo(setting, seed, task, prompts, Dataset, folder)
    else:
        trainer = _groups(method, setting, seed, task, world, prompts, Dataset, folder)
    began, before = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    left = [name for name in sys.modules if name.startswith(("kedge.train", "kedge.rollout", "kedge.models"))]
    if left:
        raise SystemExit(f"error: {left[0]} was imported")
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu": round(time.process_time() - before, 1),
        "recorder": round(trainer.kedge_seconds, 2),
    }


def name_of(method: str, fault: str, seed: int) -> str:
    """Folder of a run."""
    return f"{method}-{fault.replace(' ', '_')}-{seed}"


def _groups(
    method: str,
    setting: Setting,
    seed: int,
    task: Path,
    world: World,
    prompts: list[str],
    dataset: Any,
    out: Path,
) -> Any:
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from kedge.recorders.trl import recording

    name = method.upper()
    trainer_class, config_class = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    tokenizer = AutoTokenizer.from_pretrained(task / "policy", padding_side="left")
    steps = {"done": 0}

    def quality(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        factor = 5.0 if setting.rescaled_at is not None and steps["done"] >= setting.rescaled_at else 1.0
        found = []
        for prompt, text, ids in zip(prompts, completions, completion_ids, strict=True):
            score = world.score(prompt, text) + setting.per_token * len(ids)
            score -= setting.cut_costs * (ids[-1] != tokenizer.eos_token_id)
            found.append(factor * score)
        return found

    class Watch(TrainerCallback):
        """Counts steps, and steers beta as Ziegler et al. do where a target is set."""

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            steps["done"] = state.global_step
            measured = trainer._metrics["train"].get("kl")
            if setting.target is not None and measured:
                error = np.clip(measured[-1] / setting.target - 1, -0.2, 0.2)
                trainer.beta *= 1 + error * 0.3

    arguments = config_class(
        output_dir=str(task.parent / "scratch"),
        seed=seed,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=setting.rows,
        gradient_accumulation_steps=1,
        num_generations=8,
        max_completion_length=setting.budget,
        beta=setting.beta,
        learning_rate=setting.lr,
        lr_scheduler_type="constant",
        max_steps=setting.steps,
        logging_steps=1000,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    chosen = recording(trainer_class, out, samples_every=10)
    trainer = chosen(
        model=AutoModelForCausalLM.from_pretrained(task / "policy"),
        reward_funcs=[quality],
        args=arguments,
        train_dataset=dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Watch()],
    )
    return trainer


def _ppo(
    setting: Setting,
    seed: int,
    task: Path,
    prompts: list[str],
    dataset: Any,
    out: Path,
) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from kedge.recorders.trl import recording

    tokenizer = AutoTokenizer.from_pretrained(task / "policy", padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(task / "policy") for _ in range(2))
    value, judge = (AutoModelForSequenceClassification.from_pretrained(task / "reward", num_labels=1) for _ in range(2))
    arguments = PPOConfig(
        output_dir=str(task.parent / "scratch"),
        seed=seed,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=setting.rows,
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=setting.rows,
        num_mini_batches=1,
        num_ppo_epochs=2,
        total_episodes=setting.rows * setting.steps,
        response_length=setting.budget,
        temperature=1.0,
        stop_token="eos",
        missing_eos_penalty=setting.cut_costs,
        kl_coef=setting.beta,
        learning_rate=setting.lr,
        lr_scheduler_type="constant",
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    data = dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]})
    chosen = recording(PPOTrainer, out, samples_every=10)
    return chosen(
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=judge,
        value_model=value,
        train_dataset=data,
        eval_dataset=data.select(range(64)),
    )


def found_in(folder: Path) -> dict[str, Any]:
    """What `kedge diagnose` says of a run: alarms in order, and what could not be checked."""
    from kedge.diagnose.diagnosis import diagnose, read_view

    view = read_view(folder)[0]
    findings = diagnose(view).findings
    metrics = {stage: found for stage, found in view.metrics.items() if stage != "evaluation"}
    rows_alone = diagnose(replace(view, samples=(), phrases=(), metrics=metrics)).findings

    def named(*statuses: str) -> list[str]:
        return [one.check for one in findings if one.status in statuses]

    alarms = [one for one in findings if one.status in ("fail", "warn")]
    known = [(one.onset, one.check) for one in alarms if one.onset is not None and one.status == "fail"]
    return {
        "fail": named("fail"),
        "warn": named("warn"),
        "not_checked": named("not_checked"),
        "rows_alone": [one.check for one in rows_alone if one.status == "fail"],
        "first": min(known)[1] if known else None,
        "onset": {one.check: one.onset for one in alarms},
        "strength": {one.check: round(one.strength, 2) for one in alarms},
    }


def methods_here() -> tuple[str, ...]:
    """The methods that the installed TRL has."""
    release = tuple(int(part) for part in metadata.version("trl").split(".")[:2])
    return ("ppo",) if release < (1, 13) else ("grpo", "rloo")


def cases(methods: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """Every run: method, fault, seed."""
    for seed in SEEDS:
        for method in methods:
            yield from ((method, fault, seed) for fault in METHODS[method])


def page(out: Path) -> None:
    """The figures and the page made from them."""
    rows = []
    for method, fault, seed in cases(tuple(METHODS)):
        folder = out / name_of(method, fault, seed)
        if (folder / "found.json").exists():
            found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
            rows.append({"method": method, "fault": fault, "seed": seed, **found})
    RESULTS.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    lines = [HEAD.format(**_counts(rows))]
    for row in rows:
        said = [
            ", ".join(f"`{name}`" for name in names) or "–"
            for names in (EXPECTED[row["fault"]], row["fail"], row["warn"], row["rows_alone"])
        ]
        first = f"`{row['first']}` (step {row['onset'][row['first']]})" if row["first"] else "–"
        about = f"{row['method'].upper()} | {row['fault']} | {row['seed']}"
        lines.append(f"| {about} | {said[0]} | {said[1]} | {first} | {said[2]} | {said[3]} |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _counts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the page says in numbers."""
    sick, healthy = ([row for row in rows if bool(EXPECTED[row["fault"]]) == here] for here in (True, False))

    def hit(row: dict[str, Any], where: str) -> bool:
        return bool(set(EXPECTED[row["fault"]]) & set(row[where]))

    return {
        "sick": len(sick),
        "found": sum(hit(row, "fail") for row in sick),
        "first": sum(row["first"] in EXPECTED[row["fault"]] for row in sick),
        "alone": sum(hit(row, "rows_alone") for row in sick),
        "healthy": len(healthy),
        "quiet": sum(not row["fail"] for row in healthy),
        "silent": sum(not row["fail"] and not row["warn"] for row in healthy),
        "quiet_alone": sum(not row["rows_alone"] for row in healthy),
        "share": max(row.get("recorder", 0.0) / row["seconds"] for row in rows),
        "cpu": max(row["cpu"] for row in rows),
    }


def work(out: Path, share: int, shares: int) -> None:
    """Every `shares`-th of the runs that are not there yet, from number `share` on."""
    waiting = [one for one in cases(methods_here()) if not (out / name_of(*one) / "found.json").exists()]
    for method, fault, seed in waiting[share::shares]:
        folder = out / name_of(method, fault, seed)
        shutil.rmtree(folder, ignore_errors=True)
        found = {**run(out, method, fault, seed), **found_in(folder)}
        (folder / "found.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(folder.name, found["fail"], found["warn"], f"{found['cpu']:.0f} s of one core", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--share", type=int, help="the part of the runs that this process does, below --jobs")
    parser.add_argument("--page", action="store_true", help="write the page from what is there")
    arguments = parser.parse_args()
    if arguments.page:
        page(arguments.out)
        return
    if arguments.share is not None:
        work(arguments.out, arguments.share, arguments.jobs)
        return
    prepare(arguments.out / "task")
    command = [sys.executable, __file__, "--out", str(arguments.out), "--jobs", str(arguments.jobs)]
    running = [subprocess.Popen([*command, "--share", str(share)]) for share in range(arguments.jobs)]
    if any([one.wait() for one in running]):  # noqa: C419 - all are waited for
        raise SystemExit("error: a run broke; its message is above")


if __name__ == "__main__":
    main()
