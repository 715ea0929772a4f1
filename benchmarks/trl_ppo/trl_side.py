"""TRL's side: its PPOTrainer (trl 1.12.0, the last release with one) on the prepared task, one curve a seed.

Runs in an environment of its own, in which there is no Kedge; `README.md` has the command.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import os
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from datasets import Dataset
from measure import figures
from task import Numbers, load_prompts
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

# Details of TRL's loop that no setting reaches, by what replaces what in its source.
VARIANTS: dict[str, tuple[tuple[str, str], ...]] = {
    "trl": (),
    # The score lands on the last token, and the values' mask ends with it.
    "trl-last-token": (("sequence_lengths_p1 = sequence_lengths + 1", "sequence_lengths_p1 = sequence_lengths"),),
}


def curve(task: Path, variant: str, seed: int, out: Path) -> list[dict[str, float]]:
    """The figures of each step; the policy is saved to `out`."""
    numbers = Numbers.load(task)
    transformers.set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(task / "policy", padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(task / "policy", dtype=torch.float32) for _ in range(2))
    value, judge = (
        AutoModelForSequenceClassification.from_pretrained(task / "reward", dtype=torch.float32, num_labels=1)
        for _ in range(2)
    )
    prompts = Dataset.from_dict({"input_ids": load_prompts(task)})
    rows: list[dict[str, float]] = []
    generation = ppo_trainer.batch_generation

    def watched(model: Any, queries: Any, *rest: Any) -> Any:
        found = generation(model, queries, *rest)
        rows.append(figures(model, reference, judge, queries, found[0][:, queries.shape[1] :]))
        return found

    ppo_trainer.batch_generation = watched
    try:
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as scratch:
            trainer = changed(VARIANTS[variant])(
                args=_settings(numbers, seed, scratch),
                processing_class=tokenizer,
                model=policy,
                ref_model=reference,
                reward_model=judge,
                value_model=value,
                train_dataset=prompts,
                eval_dataset=prompts.select(range(numbers.batch)),
            )
            trainer.train()
    finally:
        ppo_trainer.batch_generation = generation
    policy.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return rows


def changed(changes: tuple[tuple[str, str], ...]) -> Any:
    """PPOTrainer with lines of its `train` replaced; each must be there exactly once."""
    if not changes:
        return PPOTrainer
    source = textwrap.dedent(inspect.getsource(PPOTrainer.train))
    for old, new in changes:
        if source.count(old) != 1:
            raise SystemExit(f"error: {old!r} is not in this TRL -> install trl==1.12.0")
        source = source.replace(old, new)
    space: dict[str, Any] = dict(vars(ppo_trainer))
    # The patched function has to see the watched generation, which is put into the module later.
    space["batch_generation"] = lambda *given: ppo_trainer.batch_generation(*given)
    exec(source, space)
    return type("ChangedPPOTrainer", (PPOTrainer,), {"train": space["train"]})


def _settings(numbers: Numbers, seed: int, scratch: str) -> PPOConfig:
    return PPOConfig(
        output_dir=scratch,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=numbers.batch,
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=numbers.batch,
        num_mini_batches=numbers.minibatches,
        num_ppo_epochs=numbers.epochs,
        total_episodes=numbers.batch * numbers.steps,
        response_length=numbers.budget,
        temperature=numbers.temperature,
        stop_token="eos",
        missing_eos_penalty=numbers.missing_eos_penalty,
        kl_coef=numbers.beta,
        kl_estimator="k1",
        cliprange=numbers.clip,
        cliprange_value=numbers.value_clip,
        vf_coef=numbers.value_coefficient,
        gamma=numbers.gamma,
        lam=numbers.lam,
        whiten_rewards=False,
        learning_rate=numbers.lr,
        lr_scheduler_type="constant",
        adam_epsilon=numbers.adam_epsilon,
        weight_decay=0.0,
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variant", choices=VARIANTS, default="trl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        file = arguments.out / f"{seed}.json"
        if file.exists():
            continue
        began = time.process_time()
        rows = curve(arguments.task, arguments.variant, seed, arguments.out / f"policy-{seed}")
        found = {"seconds": time.process_time() - began, "curve": rows}
        file.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
