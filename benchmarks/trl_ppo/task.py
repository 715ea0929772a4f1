"""The work that both sides do: numbers, prompts, a policy that has learnt a little language, and a reward model.

Importing this module needs nothing but Python, so that either side can read the numbers. `prepare` needs Kedge.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PAD, EOS, BOS, UNK = range(4)
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


@dataclass(frozen=True)
class Numbers:
    """Hyper-parameters of PPO that both sides share, and the sizes of the task."""

    steps: int = 40
    batch: int = 64
    epochs: int = 4
    minibatches: int = 4
    lr: float = 1e-4
    adam_epsilon: float = 1e-5
    clip: float = 0.2
    value_clip: float = 0.2
    value_coefficient: float = 0.1  # of TRL
    return_variance: float = 0.7  # usual here; where Kedge's critic is to learn at TRL's pace
    gamma: float = 1.0
    lam: float = 0.95
    beta: float = 0.35
    budget: int = 32  # response tokens, EOS included
    missing_eos_penalty: float = 1.0
    temperature: float = 1.0
    vocabulary: int = 64
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    prompts: int = 512
    sentences: int = 4096
    sft_steps: int = 300
    reward_steps: int = 300
    reward_samples: int = 4096

    def save(self, folder: Path) -> None:
        """Write `numbers.json`."""
        folder.joinpath("numbers.json").write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Numbers:
        """Read `numbers.json`."""
        return cls(**json.loads(folder.joinpath("numbers.json").read_text(encoding="utf-8")))


def load_prompts(folder: Path, name: str = "prompts") -> list[list[int]]:
    """Token ids of each prompt, of unequal length."""
    found: list[list[int]] = json.loads(folder.joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return found


def prepare(folder: Path, numbers: Numbers, seed: int = 0) -> None:
    """Write numbers, tokenizer, prompts, `policy` and `reward`, both Hugging Face folders.

    The language: each word may be followed by eight others, some likelier, and a sentence ends with probability 1/12
    after any word. The reward: 1 for each of 20 words, -1 for each of 20 others, and 0.2 for any word; less its mean,
    over its deviation, on the policy's own samples. A model of the policy's size is fitted to it by least squares.
    """
    import torch

    from kedge.models.load import reward_model_from, save_model, scratch_policy
    from kedge.rollout.engine import TorchEngine
    from kedge.rollout.given import as_prompts, as_rollouts
    from kedge.structs import Sampling

    generator = torch.Generator().manual_seed(seed)
    words = numbers.vocabulary - len(SPECIAL)
    table = _followers(words, generator)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("prompts", "fresh"):
        rows = [_sentence(table, generator, 3, 12)[:-1] for _ in range(numbers.prompts)]
        folder.joinpath(f"{name}.json").write_text(json.dumps(rows) + "\n", encoding="utf-8")
    tokenizer = _tokenizer(numbers.vocabulary)
    sizes = {"hidden": numbers.hidden, "layers": numbers.layers, "heads": numbers.heads, "context": 64}
    policy = scratch_policy(tokenizer, family="llama", seed=seed, **sizes)

    sentences = [_sentence(table, generator, 4, 40) for _ in range(numbers.sentences)]

    def shown(_: int) -> tuple[Any, Any]:
        rows = [sentences[i] for i in torch.randint(len(sentences), (64,), generator=generator).tolist()]
        cuts = [int(torch.randint(3, min(13, len(row)), (1,), generator=generator)) for row in rows]
        parts = [(row[:cut], row[cut:][: numbers.budget]) for row, cut in zip(rows, cuts, strict=True)]
        return as_rollouts(*zip(*parts, strict=True), PAD), None

    _fit(policy, numbers.sft_steps, shown, _language_loss)
    save_model(policy, tokenizer, folder / "policy")

    ids = [load_prompts(folder)[i % numbers.prompts] for i in range(numbers.reward_samples)]
    drawn = TorchEngine(EOS, PAD).generate(policy, as_prompts(ids, PAD), Sampling(numbers.budget), generator)
    worth = torch.zeros(numbers.vocabulary)
    order = torch.randperm(words, generator=generator) + len(SPECIAL)
    worth[order[:20]], worth[order[20:40]] = 1.0, -1.0
    worth[len(SPECIAL) :] += 0.2
    target = (worth[drawn.response_ids] * drawn.response_mask).sum(dim=1)
    target = (target - target.mean()) / target.std()

    def judged(_: int) -> tuple[Any, Any]:
        index = torch.randint(len(drawn), (128,), generator=generator)
        return drawn.rows(index), target[index]

    reward = reward_model_from(policy, seed)
    _fit(reward, numbers.reward_steps, judged, _reward_loss)
    save_model(reward, tokenizer, folder / "reward")
    numbers.save(folder)  # last: its presence says that the folder is complete


def _fit(model: Any, steps: int, batch: Any, loss: Any, lr: float = 2e-3) -> None:
    """Adam with a rate that falls in a straight line."""
    import torch

    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss(model, *batch(step)).backward()
        optimizer.step()


def _language_loss(model: Any, rollouts: Any, _: Any) -> Any:
    """Negative log-likelihood per token, and what keeps padding from ever being said.

    Padding is text to one side and the end of the text to the other; a policy that says it would be two policies.
    """
    from kedge.ops.logprobs import taken
    from kedge.rollout.score import response_logprobs

    logprobs = response_logprobs(model, rollouts, 1.0)
    mask = rollouts.response_mask
    padding = (logprobs[..., PAD] + 16).clamp(min=0)  # e^-16: once in ten million tokens
    return ((0.1 * padding - taken(logprobs, rollouts.response_ids)) * mask).sum() / mask.sum()


def _reward_loss(model: Any, rollouts: Any, target: Any) -> Any:
    from kedge.rollout.score import last_token_logits

    return ((last_token_logits(model, rollouts) - target) ** 2).mean()


def _followers(words: int, generator: Any) -> Any:
    """[words, words] probabilities of the next word."""
    import torch

    table = torch.zeros(words, words)
    for row in table:
        row[torch.randperm(words, generator=generator)[:8]] = torch.rand(8, generator=generator) + 0.1
    return table / table.sum(dim=1, keepdim=True)


def _sentence(table: Any, generator: Any, least: int, most: int) -> list[int]:
    """Ids of at least `least` and at most `most` words, then EOS."""
    import torch

    word = int(torch.randint(len(table), (1,), generator=generator))
    ids = [word]
    while len(ids) < most and (len(ids) < least or float(torch.rand(1, generator=generator)) > 1 / 12):
        word = int(torch.multinomial(table[word], 1, generator=generator))
        ids.append(word)
    return [word + len(SPECIAL) for word in ids] + [EOS]


def _tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=SPECIAL[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **roles)
