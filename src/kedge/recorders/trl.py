"""Recorders for TRL: `recording(GRPOTrainer, "runs/mine")` is the trainer that also writes a trace.

GRPO and RLOO were tested with trl 1.16.0; PPO (`trl.experimental.ppo`) with trl 1.12.0, the last release that has it.
Other versions work as long as the methods that are watched take what they took; that is checked before training.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from kedge.errors import InputError, Problem
from kedge.trace.writer import TextMode

TESTED = {"GRPOTrainer": "1.16.0", "RLOOTrainer": "1.16.0", "PPOTrainer": "1.12.0"}
_GROUPS: Mapping[str, tuple[str, ...]] = {
    "_generate_and_score_completions": ("self", "inputs"),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_get_per_token_logps_and_entropies": ("self", "model", "input_ids", "attention_mask", "logits_to_keep"),
    "_compute_loss": ("self", "model", "inputs"),
}
_PPO: Mapping[str, tuple[str, ...]] = {"train": ("self",), "generate_completions": ("self",)}
_PPO_CALLS: Mapping[str, tuple[str, ...]] = {
    "batch_generation": ("model", "queries", "local_rollout_forward_batch_size", "pad_token_id", "generation_config"),
    "forward": ("model", "query_responses", "pad_token_id"),
    "get_reward": ("model", "query_responses", "pad_token_id", "context_length"),
    "masked_whiten": ("values", "mask", "shift_mean"),
    "selective_log_softmax": ("logits", "index"),
}


@dataclass(frozen=True)
class Settings:
    """What the user asked the recorder for."""

    out: Path
    name: str | None
    text: TextMode
    keep: int
    score: str | None
    samples_every: int
    samples: int
    resume: bool
    version: str


def recording(
    trainer: type[Any],
    out: Path | str,
    *,
    name: str | None = None,
    text: TextMode = "full",
    keep: int = 0,
    score: str | None = None,
    samples_every: int = 0,
    samples: int = 64,
    resume: bool = False,
) -> type[Any]:
    """A subclass of a TRL trainer class that writes the run folder `out` and trains as the class does, bit for bit.

    `text` and `keep` are those of `kedge.trace.recorder.Recorder`. `score` names the reward function that is the
    score, where there are several. With `samples_every` above 0 the policy and the reference answer `samples` prompts
    of the evaluation set, or else of the training set, before the first and after every so many steps; reward
    functions are then called for these answers, too, so they must not count their calls. `resume` goes on in `out`.

    Raises `InputError` where `trainer` is not one of TRL's, or its methods are not those that the recorder knows.
    """
    base = next((one for one in trainer.__mro__ if one.__name__ in TESTED and _package(one) == "trl"), None)
    if base is None:
        raise InputError(
            Problem(
                f"{trainer.__module__}.{trainer.__qualname__}",
                f"is no trainer that can be recorded; these are: {', '.join(TESTED)} of trl",
                "write the steps with kedge.trace.recorder.Recorder",
            )
        )
    settings = Settings(Path(out), name, text, keep, score, samples_every, samples, resume, _version())
    if base.__name__ == "PPOTrainer":
        from kedge.recorders.trl_ppo import RecordedPPO

        _require(base, _PPO, settings.version)
        _require_calls(base, settings.version)
        mixin: type[Any] = RecordedPPO
    else:
        from kedge.recorders.trl_groups import RecordedGroups

        _require(base, _GROUPS, settings.version)
        mixin = RecordedGroups
    return type(f"Recorded{trainer.__name__}", (mixin, trainer), {"kedge_settings": settings, "kedge_base": base})


def _version() -> str:
    try:
        return metadata.version("trl")
    except metadata.PackageNotFoundError:  # a copy of the source that was not installed
        return "of unknown version"


def _package(found: type[Any]) -> str:
    return found.__module__.partition(".")[0]


def _require(base: type[Any], methods: Mapping[str, Sequence[str]], version: str) -> None:
    """Raises `InputError` unless the class has the methods, and they begin with the parameters that are known."""
    problems = []
    for name, known in methods.items():
        method = getattr(base, name, None)
        problems += _compared(f"{base.__name__}.{name}", method, known, base, version)
    if problems:
        raise InputError(problems)


def _require_calls(base: type[Any], version: str) -> None:
    """The same of the functions that PPO's `train` calls, which have to be those of its module."""
    space, called = vars(sys.modules[base.__module__]), base.train.__code__.co_names
    problems = []
    for name, known in _PPO_CALLS.items():
        function = space.get(name) if name in called else None
        problems += _compared(f"{base.__module__}.{name}", function, known, base, version)
    if problems:
        raise InputError(problems)


def _compared(where: str, found: Any, known: Sequence[str], base: type[Any], version: str) -> list[Problem]:
    tested = TESTED[base.__name__]
    remedy = f"pip install trl=={tested}, with which this recorder was tested"
    if found is None:
        return [Problem(where, f"is not called by {base.__name__} of trl {version}", remedy)]
    takes = tuple(inspect.signature(found).parameters)
    if takes[: len(known)] == tuple(known):
        return []
    return [Problem(where, f"takes ({', '.join(takes)}) in trl {version}; expected ({', '.join(known)})", remedy)]
