"""Files as a user would bring them, in small: a clerk repeats what it is told to say."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

WORDS = ("red", "blue", "green", "open", "closed", "today", "never", "order", "refund", "late")
PROMPTS = [f"please say {first} {second}" for first in WORDS for second in WORDS]
DEMONSTRATIONS = [{"prompt": text, "response": text.removeprefix("please say ")} for text in PROMPTS]
PREFERENCES = [
    {"prompt": row["prompt"], "chosen": row["response"], "rejected": f"{row['response']} and so on"}
    for row in DEMONSTRATIONS
]

RECIPE = """
name = "files"
world = "files"
threads = 1

[data]
demonstrations = "demonstrations.jsonl"
preferences = "preferences.jsonl"
prompts = "prompts.jsonl"
holdout = 0.2

[model]
hidden = 16
layers = 1
heads = 2
vocab = 300
context = 64

[sft]
steps = 4
batch_size = 16
warmup = 1

[reward]
epochs = 1
batch_size = 16
holdout = 0.2

[policy]
steps = 2
prompts_per_step = 8
max_new_tokens = 10

[evaluate]
prompts = 12

[trace]
probes = 6
"""


def conversation(prompt: str, *answer: str) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": "you are a clerk"}, {"role": "user", "content": prompt}]
    return turns + [{"role": "assistant", "content": text} for text in answer]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as JSONL, CSV or Parquet, by the suffix."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def bring(folder: Path) -> Path:
    """The three files and a recipe in `folder`; returns the recipe."""
    write(folder / "demonstrations.jsonl", DEMONSTRATIONS)
    write(folder / "preferences.jsonl", PREFERENCES)
    write(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    recipe = folder / "files.toml"
    recipe.write_text(RECIPE)
    return recipe


def byte_tokenizer() -> Any:
    """A tokenizer as GPT-2's: bytes, one special token, no padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def save_family(family: str, folder: Path) -> Path:
    """A tiny model of `family` with random weights, saved by transformers alone."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    shared = {"vocab_size": len(tokenizer), "bos_token_id": 256, "eos_token_id": 256}
    torch.manual_seed(0)
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **shared))
    else:
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            **shared,
        )
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
