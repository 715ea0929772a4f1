"""Models in and out: from scratch, from a Hugging Face folder, to a folder.

Only safetensors are read and written, no code of a model folder runs unless asked for, and a local folder never
causes a network call.
"""

from __future__ import annotations

import copy
import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
)
from transformers.utils import logging

from kedge.errors import InputError, Problem
from kedge.models.folder import check_folder, check_tokenizer_files, is_local


def scratch_policy(
    tokenizer: Any, *, family: str, hidden: int, layers: int, heads: int, context: int, seed: int
) -> Any:
    """A causal language model with random weights and tied embeddings, float32, in eval mode, dropout 0.

    `seed` fixes the weights; the caller's random state is left alone. Raises `InputError` on sizes that do not fit.
    """
    shared = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
        # 0.02, the usual spread, suits widths near 1000; a narrow model starts so flat with it that it learns to look
        # facts up several times later.
        "initializer_range": max(0.02, 0.8 / math.sqrt(hidden)),
    }
    if hidden % heads or (family == "llama" and (hidden // heads) % 2):
        even = "an even multiple" if family == "llama" else "a multiple"
        raise InputError(Problem("model.hidden", f"{hidden} is not {even} of model.heads = {heads}", "change either"))
    config: Any
    if family == "llama":
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=16 * math.ceil(hidden * 8 / 3 / 16),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=context,
            attention_dropout=0.0,
            **shared,
        )
    elif family == "gpt2":
        config = GPT2Config(
            n_embd=hidden,
            n_inner=4 * hidden,
            n_layer=layers,
            n_head=heads,
            n_positions=context,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            summary_first_dropout=0.0,
            **shared,
        )
    else:
        raise InputError(Problem("model.family", f"{family!r} is not known", "use llama or gpt2"))
    return seeded_weights(seed, lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()


def load_policy(path: str | Path, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The causal language model and tokenizer in a folder (or, for a name that is no path, on the Hub).

    Weights arrive in float32, eval mode, with every parameter checked to be finite. A tokenizer without padding gets
    its unknown or opening token for it, else EOS: masks, not ids, tell padding from text. Raises `InputError` for
    whatever is missing, damaged, unsafe or not a language model.
    """
    local = is_local(path)
    if local:
        check_folder(Path(path), trust_remote_code)
        check_tokenizer_files(Path(path))
    options = {"trust_remote_code": trust_remote_code, "local_files_only": local}
    tokenizer = _attempt(path, "tokenizer", lambda: AutoTokenizer.from_pretrained(str(path), **options))
    model = _load(AutoModelForCausalLM, path, options)
    _check_tokenizer(tokenizer, model, path)
    return model, tokenizer


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model folder. Raises `InputError` where there is none, or none that can end a response."""
    check_tokenizer_files(folder)
    tokenizer = _attempt(folder, "tokenizer", lambda: AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
    if tokenizer.eos_token_id is None:
        remedy = "set eos_token in tokenizer_config.json"
        raise InputError(Problem(str(folder), "its tokenizer has no end-of-sequence token", remedy))
    return tokenizer


def require_same_tokens(folder: Path, tokenizer: Any, remedy: str) -> None:
    """Raise `InputError` if the model in `folder` reads other token ids than `tokenizer` writes; no folder is no model.

    A vocabulary made from texts differs with the texts, and a model that reads another one fails without a word.
    """
    if folder.is_dir() and load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise InputError(Problem(str(folder), "this model was made with another tokenizer than this run's", remedy))


def load_classifier(path: str | Path, heads: int = 1) -> Any:
    """The `AutoModelForSequenceClassification` with `heads` labels in a folder or on the Hub, eval mode.

    Raises `InputError` as `load_policy` does, and for a model without a linear score head of that many labels.
    """
    local = is_local(path)
    if local:
        check_folder(Path(path), trust_remote_code=False)
    options = {"trust_remote_code": False, "local_files_only": local}
    model = _load(AutoModelForSequenceClassification, path, {**options, "num_labels": heads})
    _score_head(model, str(path), heads)
    return model


def save_model(model: Any, tokenizer: Any, path: str | Path) -> None:
    """Write an ordinary Hugging Face folder, safetensors only, as `write_folder` does."""

    def fill(folder: Path) -> None:
        save_pretrained(model, tokenizer, folder)

    write_folder(path, fill)


def save_pretrained(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer into a folder that is being filled, without a word on the terminal."""
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def write_folder(path: str | Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write the files of a folder; `path` appears complete or not at all.

    A folder that is already there is replaced, and kept if the new one cannot be put in its place. Raises `InputError`
    if that place cannot be written.
    """
    path = Path(path)
    partial, old = (path.with_name(f".{path.name}.{kind}-{os.getpid()}") for kind in ("partial", "old"))
    try:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "there is a file of that name")
        partial.mkdir(parents=True)
        fill(partial)
        if path.exists():
            path.replace(old)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        if old.exists() and not path.exists():
            old.replace(path)
        what = f"the model cannot be written: {getattr(error, 'strerror', None) or error}"
        raise InputError(Problem(str(path), what, "choose a folder with space that you may write to")) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def disable_dropout(model: Any) -> Any:
    """Set every dropout of `model` to 0, in its config and its modules, and return it in eval mode.

    PPO compares log-probabilities of the same weights taken at two times. Dropout would make them differ, so that the
    ratio is not 1 on the first minibatch and the KL to the reference has a floor of pure noise. A rate of 0 keeps it
    that way even if somebody calls `train()`.
    """
    for name, value in vars(model.config).items():
        if _is_rate(name, value):
            setattr(model.config, name, 0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if _is_rate(name, value):
                setattr(module, name, 0.0)
    return model.eval()


def reward_model_from(policy_model: Any, seed: int, heads: int = 1) -> Any:
    """A sequence classifier of the policy's configuration that starts from a copy of its trunk.

    The score heads are drawn from N(0, 1 / sqrt(d + 1)), d the width (Stiennon et al. 2020, Appendix B.1).
    """
    config = copy.deepcopy(policy_model.config)
    config.num_labels = heads
    model = seeded_weights(
        seed, lambda: AutoModelForSequenceClassification.from_config(config, dtype=policy_model.dtype)
    )
    model.base_model.load_state_dict(policy_model.base_model.state_dict())
    head = _score_head(model, str(config.model_type), heads)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / math.sqrt(head.in_features + 1))
    return model.to(policy_model.device).eval()


def seeded_weights(seed: int, build: Callable[[], Any]) -> Any:
    """`build()` under `seed` on the CPU generator, which is where Hugging Face models draw their weights."""
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        return build()


def _is_rate(name: str, value: object) -> bool:
    return ("dropout" in name or "pdrop" in name or "layerdrop" in name) and isinstance(value, float)


def _score_head(model: Any, where: str, heads: int) -> nn.Linear:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != heads:
        labels = "one-label" if heads == 1 else f"{heads}-label"
        what = f"{type(model).__name__} has no {labels} `score` head"
        raise InputError(Problem(where, what, "use a decoder-only family such as Llama, Qwen or GPT-2"))
    return head


def _load(kind: Any, path: str | Path, options: dict[str, Any]) -> Any:
    """The model in eval mode with nothing missing and every parameter finite."""
    load = {**options, "use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    model, info = _attempt(path, "model", lambda: kind.from_pretrained(str(path), **load))
    missing = sorted(info["missing_keys"])
    if missing:
        what = f"the weights lack {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
        raise InputError(Problem(str(path), what, f"give a folder saved from {type(model).__name__}"))
    unused = [key for key in sorted(info["unexpected_keys"]) if key.startswith(("score.", "classifier."))]
    if unused:
        raise InputError(Problem(str(path), f"a classifier ({unused[0]}), not a language model", "give the policy"))
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(Problem(str(path), f"{name} has values that are not finite", "use an intact checkpoint"))
        # Mapped from the file a tensor starts at any byte, and kernels that round differently may run on it: a model
        # read back would not score exactly as the one that was saved. A copy is aligned like any other tensor.
        parameter.data = parameter.data.clone()
    return model.eval()


def _attempt(path: str | Path, what: str, load: Callable[[], Any]) -> Any:
    """`load()`, with whatever transformers raises turned into one line."""
    try:
        with _quiet():
            return load()
    except Exception as error:  # transformers raises OSError, ValueError, RuntimeError, KeyError, SafetensorError, ...
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"the {what} cannot be loaded: {lines[0] if lines else type(error).__name__}"
        raise InputError(Problem(str(path), reason, "give a complete Hugging Face model folder")) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the terminal; Kedge checks and reports for itself."""
    bars = logging.is_progress_bar_enabled()
    levels = [(source, source.get_verbosity()) for source in (logging, hub_logging)]
    logging.disable_progress_bar()
    for source, _ in levels:
        source.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        for source, level in levels:
            source.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _check_tokenizer(tokenizer: Any, model: Any, path: str | Path) -> None:
    """Raise `InputError` unless the tokenizer can end a response and fits the embeddings; see that it can pad."""
    if tokenizer.eos_token_id is None:
        remedy = "set eos_token in tokenizer_config.json"
        raise InputError(Problem(str(path), "its tokenizer has no end-of-sequence token", remedy))
    rows = model.get_input_embeddings().num_embeddings
    if max(tokenizer.get_vocab().values(), default=0) >= rows:
        what = f"its tokenizer has ids up to {max(tokenizer.get_vocab().values())}, the model only {rows} embeddings"
        raise InputError(Problem(str(path), what, "give the tokenizer that belongs to the model"))
    if tokenizer.pad_token_id is None:
        candidates = [tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token]
        distinct = [token for token in candidates if token is not None and token != tokenizer.eos_token]
        tokenizer.pad_token = distinct[0] if distinct else tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
