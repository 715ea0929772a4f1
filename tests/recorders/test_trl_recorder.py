"""TRL's own trainers on a tiny random model, recorded: they train as without, and the trace holds what they did.

Runs where TRL is installed, which Kedge's own environment lacks: `make test-trl`. GRPO and RLOO take trl 1.16.0, PPO
takes trl 1.12.0, the last release that has it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kedge.diagnose.diagnosis import diagnose, read_view
from kedge.errors import InputError
from kedge.recorders.trl import recording
from kedge.trace.reader import read_run

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def _version() -> str:
    try:
        return metadata.version("trl")
    except metadata.PackageNotFoundError:
        return ""


FOUND = _version()
groups = pytest.mark.skipif(FOUND != "1.16.0", reason=f"needs trl 1.16.0, found {FOUND or 'none'}: make test-trl")
ppo = pytest.mark.skipif(FOUND != "1.12.0", reason=f"needs trl 1.12.0, found {FOUND or 'none'}: make test-trl")
if not FOUND:
    pytest.skip("TRL is not installed here: make test-trl", allow_module_level=True)

WORDS = [f"w{number}" for number in range(12)]
PROMPTS = [f"{first} {second}" for first in WORDS[:4] for second in WORDS[4:8]]
BUDGET = 6


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy and reward model with a word-level tokenizer, as Hugging Face folders."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    folder: Path = tmp_path_factory.mktemp("task")
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(
        vocab_size=len(vocabulary), num_key_value_heads=2, max_position_embeddings=32, **sizes, **special
    )
    import torch

    torch.manual_seed(0)
    policy = LlamaForCausalLM(config)
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.02)
    for _ in range(40):  # a random policy would say <pad> and <bos>
        logits = policy(input_ids=torch.randint(2, len(vocabulary), (16, 12))).logits
        optimiser.zero_grad()
        logits.log_softmax(-1)[..., :2].logsumexp(-1).mean().backward()
        optimiser.step()
    policy.save_pretrained(folder / "policy")
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)
    return folder


def many(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Words of the answer that are among the first six."""
    return [float(sum(word in WORDS[:6] for word in text.split())) for text in completions]


def polite(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """1 where the answer repeats a word of the prompt."""
    return [
        float(bool(set(text.split()) & set(prompt.split()))) for prompt, text in zip(prompts, completions, strict=True)
    ]


def trained(
    task: Path, name: str, out: Path | None, *, rewards: list[Callable[..., Any]] | None = None, **changes: Any
) -> Any:
    """A finished GRPO or RLOO trainer; recorded where `out` is given."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    about = {key: changes.pop(key) for key in ("samples_every", "samples", "score") if key in changes}
    settings = {
        "output_dir": str(task / "scratch"),
        "seed": 3,
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "num_generations": 4,
        "max_completion_length": BUDGET,
        "beta": 0.1,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    } | changes
    base = getattr(trl, f"{name}Trainer")
    chosen = base if out is None else recording(base, out, **about)
    trainer = chosen(
        model=AutoModelForCausalLM.from_pretrained(task / "policy"),
        reward_funcs=rewards or [many],
        args=getattr(trl, f"{name}Config")(**settings),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(task / "policy"),
    )
    trainer.train()
    return trainer


def history(trainer: Any) -> list[dict[str, float]]:
    """What the trainer logged, clocks left out."""
    clocks = ("time", "runtime", "per_second", "flos", "eps")
    return [
        {name: value for name, value in line.items() if not any(word in name for word in clocks)}
        for line in trainer.state.log_history
    ]


def same(one: Any, other: Any) -> bool:
    """Whether two policies have the same weights to the last bit."""
    import torch

    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def tokens(prompt: str | None) -> list[int]:
    """A prompt's token ids: words come after three special tokens."""
    assert prompt is not None
    return [3 + WORDS.index(word) for word in prompt.split()]


def direct(task: Path, prompt: list[int], response: list[int], temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities of a response under the untrained policy, one row by itself."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(task / "policy")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[range(len(response)), response].numpy()


@groups
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_training_is_the_same_to_the_last_bit(task: Path, tmp_path: Path, name: str) -> None:
    more = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 8}
    plain = trained(task, name, None, **more)
    watched = trained(task, name, tmp_path / "run", samples_every=1, samples=6, **more)
    assert history(plain) == history(watched) and len(history(plain)) == 9
    assert same(plain.model, watched.model)
    assert read_run(tmp_path / "run").steps() == (0, 1)  # a batch of two pieces is seen twice


@groups
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_rows_are_what_the_trainer_computed(task: Path, tmp_path: Path, name: str) -> None:
    trained(
        task,
        name,
        tmp_path / "run",
        steps_per_generation=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=8,
    )
    run = read_run(tmp_path / "run")
    step = run.step(0)
    score = np.array(many(step.prompts, step.responses))
    np.testing.assert_allclose(step.rewards[..., step.channels.index("score")].sum(axis=1), score)
    ids = [[int(token) for token in row[mask]] for row, mask in zip(step.response_ids, step.response_mask, strict=True)]
    assert step.ended.tolist() == [row[-1] == 2 for row in ids]
    assert step.group.tolist() == [row // 4 for row in range(16)]
    for row in range(16):  # the loss saw the rows shuffled and in two pieces
        asked = tokens(step.prompts[row])
        alone = direct(task, asked, ids[row])
        length = len(ids[row])
        np.testing.assert_allclose(step.tokens["old_logprob"][row, :length], alone, atol=2e-5)
        np.testing.assert_allclose(step.tokens["reference_logprob"][row, :length], alone, atol=2e-5)
    kl = (
        np.zeros(16)
        if name == "GRPO"
        else np.array(
            [  # RLOO charges the KL of the response in its reward
                (step.tokens["old_logprob"][row] - step.tokens["reference_logprob"][row])[step.response_mask[row]].sum()
                for row in range(16)
            ]
        )
    )
    reward, expected = score - 0.1 * kl, np.zeros(16)
    for row in range(16):
        group = [other for other in range(16) if other // 4 == row // 4]
        if name == "RLOO":
            expected[row] = reward[row] - np.mean([reward[other] for other in group if other != row])
        else:
            expected[row] = (reward[row] - reward[group].mean()) / (reward[group].std(ddof=1) + 1e-4)
    np.testing.assert_allclose(step.advantage()[:, 0], expected, atol=1e-4)
    assert "rest" not in step.channels
    later = run.step(2)
    assert np.abs((later.tokens["old_logprob"] - later.tokens["reference_logprob"])[later.response_mask]).mean() > 1e-3
    meaning = run.manifest["conventions"]
    assert meaning["trainer"] == f"trl 1.16.0 {name}" and meaning["kl_unit"] == "per token" and meaning["beta"] == 0.1
    assert meaning["kl"] == {"GRPO": "loss", "RLOO": "reward"}[name]
    assert meaning["kl_estimator"] == {"GRPO": "k3+", "RLOO": "k1"}[name]
    assert run.manifest["status"] == "finished" and "behaviour_logprob" in run.manifest["absent"]


@groups
def test_later_iterations_move_away_from_the_first(task: Path, tmp_path: Path) -> None:
    trained(task, "GRPO", tmp_path / "run", num_iterations=3, max_steps=3)
    step = read_run(tmp_path / "run").step(0)
    moved = (step.tokens["new_logprob"] - step.tokens["old_logprob"])[step.response_mask]
    assert 1e-4 < np.abs(moved).mean() < 5
    ratio, sign = np.exp(step.tokens["new_logprob"] - step.tokens["old_logprob"]), step.advantage()
    held = ((ratio > 1.2) & (sign > 0)) | ((ratio < 0.8) & (sign < 0))
    assert held[step.response_mask].any()
    assert (step.active == ~held)[step.response_mask].all()


@groups
def test_without_beta_there_is_no_reference_and_checks_say_so(task: Path, tmp_path: Path) -> None:
    trained(task, "GRPO", tmp_path / "run", beta=0.0, max_steps=6, samples_every=3, samples=5)
    view, _ = read_view(tmp_path / "run")
    assert "reference_logprob" in view.absent
    findings = {one.check: one for one in diagnose(view).findings}
    assert findings["beta"].status == "not_checked" and "reference" in findings["beta"].summary
    assert findings["reward_unit"].status != "not_checked" or "steps" in findings["reward_unit"].summary
    assert [sample["step"] for sample in view.samples] == [0, 3, 6]


@groups
def test_several_rewards_are_channels_with_their_weights(task: Path, tmp_path: Path) -> None:
    more = {"rewards": [many, polite], "reward_weights": [0.5, 2.0]}
    trained(task, "RLOO", tmp_path / "run", score="many", **more)
    step = read_run(tmp_path / "run").step(1)
    assert {"score", "polite", "kl"} <= set(step.channels)
    weight = {name: float(step.weights[0, index]) for index, name in enumerate(step.channels)}
    assert (weight["score"], weight["polite"], weight["kl"]) == (0.5, 2.0, pytest.approx(-0.1))
    assert "rest" not in step.channels
    with pytest.raises(InputError, match="is no reward function; there are many, polite"):
        trained(task, "RLOO", tmp_path / "other", score="none", **more)


@groups
def test_samples_pair_the_policy_with_the_reference(task: Path, tmp_path: Path) -> None:
    trained(task, "RLOO", tmp_path / "run", max_steps=4, samples_every=2, samples=6)
    run = read_run(tmp_path / "run")
    assert run.sample_steps() == (0, 2, 4)
    first, last = run.samples(0), run.samples(4)
    texts = [table.column("reference_response").to_pylist() for table in (first, last)]
    assert texts[0] == texts[1] and len(texts[0]) == 6
    np.testing.assert_allclose(first.column("kl").to_numpy(), 0, atol=1e-5)
    assert np.abs(last.column("kl").to_numpy()).max() > 1e-3
    np.testing.assert_allclose(last.column("score").to_numpy(), many([], last.column("response").to_pylist()))


@groups
def test_a_run_that_breaks_says_so(task: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def breaks(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return many(prompts, completions)

    with pytest.raises(RuntimeError, match="out of luck"):
        trained(task, "RLOO", tmp_path / "run", rewards=[breaks], max_steps=5)
    run = read_run(tmp_path / "run")
    assert run.manifest["status"] == "interrupted" and run.steps() == (0, 1)


@groups
def test_responses_that_are_masked_are_left_out(task: Path, tmp_path: Path) -> None:
    trained(task, "GRPO", tmp_path / "run", mask_truncated_completions=True, scale_rewards="none")
    run = read_run(tmp_path / "run")
    step = run.step(0)
    assert len(step) < 16 and "ended" in step.absent
    share = run.metrics("policy")["length/ended"].values[0]
    assert share == pytest.approx(len(step) / 16)


def trained_ppo(task: Path, out: Path | None, **changes: Any) -> Any:
    """A finished PPO trainer; recorded where `out` is given."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    about = {key: changes.pop(key) for key in ("samples_every", "samples") if key in changes}
    tokenizer = AutoTokenizer.from_pretrained(task / "policy")
    policy, reference = (AutoModelForCausalLM.from_pretrained(task / "policy") for _ in range(2))
    value, judge = (AutoModelForSequenceClassification.from_pretrained(task / "reward", num_labels=1) for _ in range(2))
    settings = {
        "output_dir": str(task / "scratch"),
        "seed": 3,
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "local_rollout_forward_batch_size": 6,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "total_episodes": 48,
        "response_length": BUDGET,
        "temperature": 0.7,
        "stop_token": "eos",
        "missing_eos_penalty": 1.0,
        "kl_coef": 0.1,
        "learning_rate": 1e-2,
        "num_sample_generations": 2,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    } | changes
    set_seed(3)  # PPO shuffles with NumPy's generator, which it does not seed
    data = Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]})
    chosen = PPOTrainer if out is None else recording(PPOTrainer, out, **about)
    trainer = chosen(
        args=PPOConfig(**settings),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=judge,
        value_model=value,
        train_dataset=data,
        eval_dataset=data,
    )
    trainer.train()
    return trainer


@ppo
def test_ppo_trains_the_same_to_the_last_bit(task: Path, tmp_path: Path) -> None:
    plain, watched = trained_ppo(task, None), trained_ppo(task, tmp_path / "run", samples_every=1, samples=5)
    assert history(plain) == history(watched) and history(plain)
    assert same(plain.model.policy, watched.model.policy)
    assert read_run(tmp_path / "run").sample_steps()[0] == 0


@ppo
def test_ppo_rows_are_what_the_trainer_computed(task: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    watched = trained_ppo(task, tmp_path / "run")
    run = read_run(tmp_path / "run")
    step = run.step(0)
    assert len(run.steps()) == len([line for line in history(watched) if "objective/kl" in line])
    judge = AutoModelForSequenceClassification.from_pretrained(task / "reward", num_labels=1)
    for row in range(len(step)):
        mask = step.response_mask[row]
        asked = tokens(step.prompts[row])
        said = [int(token) for token in step.response_ids[row][mask]]
        assert bool(step.ended[row]) == (2 in said)
        alone = direct(task, asked, said, temperature=0.7)
        for name in ("old_logprob", "reference_logprob", "behaviour_logprob"):
            np.testing.assert_allclose(step.tokens[name][row][mask], alone, atol=3e-5)
        with torch.no_grad():
            score = float(judge(input_ids=torch.tensor([[*asked, *said]])).logits[0, 0])
        assert step.rewards[row, :, step.channels.index("score")].sum() == pytest.approx(score, abs=1e-4)
        assert step.rewards[row, :, step.channels.index("missing_eos")].sum() == float(2 not in said)
    moved = (step.tokens["new_logprob"] - step.tokens["old_logprob"])[step.response_mask]
    assert np.isfinite(moved).all() and np.abs(moved).mean() > 1e-4
    whitened = step.advantage()[step.response_mask]
    assert (whitened.mean(), whitened.std(ddof=1)) == (pytest.approx(0, abs=1e-4), pytest.approx(1, abs=1e-3))
    entropy = step.tokens["entropy"][step.response_mask]
    assert (entropy > 0).all() and (entropy <= np.log(15) + 1e-4).all()
    meaning = run.manifest["conventions"]
    assert meaning["score_position"] == "after" and meaning["normalisation"] == "batch" and meaning["beta"] == 0.1
    diagnose(read_view(tmp_path / "run")[0])
    assert not [name for name in sys.modules if name.startswith("kedge.train")]
