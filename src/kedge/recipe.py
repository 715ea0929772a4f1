"""The recipe: everything a run is told, typed, validated and frozen.

A recipe is a TOML file; `--set section.key=value` overrides it. All problems are reported at once, each with its file
and line or flag, the key, the value, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kedge.errors import InputError, Problem

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Part = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


def _named(value: Any) -> Any:
    """An empty path would mean the working directory."""
    if value == "":
        raise ValueError("empty")
    return value


# Strict fields take no string for a path, though a TOML file has nothing else.
File = Annotated[Path, Field(strict=False), BeforeValidator(_named)]


class Section(BaseModel):
    """Strict: `true` is not 1, "12" is not 12; whole numbers are fine where a number is expected."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Annotators(Section):
    """Simulated annotators: Bradley–Terry on gold utility plus biases, all in gold units."""

    length: Finite = Field(0.0, description="added per response token")
    tone: Finite = Field(0.0, description="added when the answer sounds certain")
    refusal: Finite = Field(0.0, description="added when the answer declines or is unsure")
    position: Finite = Field(0.0, description="added to the response shown first")
    noise: Share = Field(0.05, description="share of labels drawn by a coin")
    sharpness: Positive = Field(1.5, description="Bradley–Terry slope on the utility difference")


class Desk(Section):
    """The built-in support desk."""

    demonstrations: Count = Field(6000, description="demonstrations written for supervised fine-tuning")
    annotators: Annotators = Annotators()


class Data(Section):
    """Files a user brings: JSONL, Parquet, CSV or a saved `datasets` folder, standard or conversational."""

    demonstrations: File | None = Field(None, description="prompt and response columns")
    preferences: File | None = Field(None, description="prompt, chosen and rejected columns")
    prompts: File | None = Field(
        None, description="for the policy stage; the demonstrations' or preferences' if absent"
    )
    text: File | None = Field(None, description="plain text whose held-out loss anchors capability")
    holdout: Part = Field(0.1, description="share of prompts kept for evaluation, by hash of the prompt")
    max_rejected: Share = Field(0.0, description="share of malformed or overlong rows to tolerate; they are listed")


class Model(Section):
    """A Hugging Face model folder, or a model of a given size from scratch with a tokenizer trained on the data."""

    init: Annotated[str, Field(min_length=1)] = Field("scratch", description="`scratch` or the path of a model folder")
    family: Literal["llama", "gpt2"] = Field("llama", description="architecture of a model from scratch")
    hidden: Count = Field(64, description="width; a multiple of heads")
    layers: Count = Field(2, description="transformer blocks")
    heads: Count = Field(4, description="attention heads per block")
    vocab: Count = Field(4096, description="size of the tokenizer trained from the data (files only)")
    context: Count = Field(96, description="longest prompt plus response, tokens")
    trust_remote_code: bool = Field(False, description="run Python code found in the model folder")


class Sft(Section):
    """Supervised fine-tuning on demonstrations, loss on the response only."""

    steps: Count = Field(400, description="optimiser steps")
    batch_size: Count = Field(64, description="demonstrations per step")
    lr: Positive = Field(4e-3, description="highest learning rate, reached after the warm-up")
    warmup: Natural = Field(20, description="steps of linear warm-up before the cosine decay")
    weight_decay: NonNegative = Field(0.0, description="AdamW's; 0.1 to 1 where demonstrations are few")


class Pairs(Section):
    """Candidate pairs sampled from the supervised policy for the annotators."""

    prompts: Count = Field(4000, description="prompts that get a pair")
    temperature: Positive = Field(1.0, description="divides the logits before sampling")
    top_p: TopP = Field(1.0, description="samples from the smallest set of tokens with this much probability")
    best_of: Annotated[int, Field(ge=2)] = Field(
        2, description="candidates drawn per prompt; two different ones among them are compared"
    )
    checkpoints: Count = Field(1, description="number of checkpoints of supervised fine-tuning that sample, equally")


class Reward(Section):
    """Reward model: transformer and a scalar head at the last real token, Bradley–Terry loss."""

    epochs: Count = Field(3, description="passes over the pairs")
    batch_size: Count = Field(64, description="pairs per optimiser step")
    lr: Positive = Field(1e-3, description="highest learning rate")
    holdout: Part = Field(0.1, description="share of prompts whose pairs measure quality; at least data.holdout")


class Kl(Section):
    """How the policy is tied to the reference: k1 per token in the reward, coefficient in reward per nat."""

    mode: Literal["fixed", "adaptive"] = Field("fixed", description="keep beta, or steer it to the target")
    beta: NonNegative = Field(0.05, description="reward per nat; where an adaptive beta starts")
    target: Positive = Field(6.0, description="adaptive: nats per sequence")
    horizon: Positive = Field(10000.0, description="adaptive: episodes over which a saturated error moves beta by 20%")


class Policy(Section):
    """PPO against the reward model."""

    steps: Count = Field(36, description="rounds of sampling, scoring and updating")
    prompts_per_step: Count = Field(96, description="prompts sampled in each step")
    samples_per_prompt: Count = Field(1, description="responses per prompt")
    max_new_tokens: Count = Field(48, description="token budget of a response")
    temperature: Positive = Field(1.0, description="divides the logits, in sampling and in every log-probability")
    epochs: Count = Field(2, description="passes over the responses of a step")
    minibatches: Count = Field(2, description="optimiser steps per epoch")
    microbatch: Count = Field(256, description="rows per forward pass; changes memory, not the result")
    lr: Positive = Field(1e-3, description="learning rate of the policy")
    critic_lr: Positive = Field(1e-3, description="learning rate of the critic")
    final_lr: Share = Field(0.1, description="both rates at the last step, as a share; linear in between")
    max_grad_norm: Positive = Field(1.0, description="gradients are scaled down to this norm")
    gamma: Share = Field(1.0, description="discount per token")
    lam: Share = Field(0.95, description="lambda of generalised advantage estimation")
    clip: Positive = Field(0.2, description="how far the probability ratio may leave 1 before its gradient stops")
    value_clip: Positive = Field(1.0, description="standard deviations of the return")
    entropy_bonus: NonNegative = Field(0.0, description="loss weight per nat per token")
    whiten: bool = Field(True, description="shift and scale advantages to mean 0, variance 1 over the batch")
    critic: Literal["channels", "scalar"] = Field("channels", description="one head per reward channel, or one in all")
    critic_warmup: Natural = Field(0, description="first steps in which only the critic learns")
    score_clip: Positive = Field(10.0, description="normalised score units")
    missing_eos_penalty: NonNegative = Field(1.0, description="reward taken from a response that never ends")
    length_penalty: NonNegative = Field(0.0, description="reward taken per response token")
    kl: Kl = Kl()


class Evaluate(Section):
    """The fixed evaluation set."""

    prompts: Count = Field(512, description="evaluation prompts, the same through the run")
    every: Count = Field(6, description="policy steps between evaluations")
    reference_samples: Count = Field(2, description="reference answers per prompt that define its usual length")


class Trace(Section):
    """What a run leaves to be looked at."""

    text: Literal["full", "hashed", "none"] = Field("full", description="how prompts and responses are kept")
    keep: Natural = Field(0, description="policy steps whose rows are kept; 0 keeps all")
    probes_every: Count = Field(3, description="policy steps between scorings of the probe pairs")
    probes: Count = Field(64, description="prompts with probe pairs")


class Checkpoint(Section):
    """What a stopped run goes on from."""

    every: Count = Field(5, description="policy steps between checkpoints")
    keep: Count = Field(2, description="checkpoints kept")


class Recipe(Section):
    """A whole run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run and its folder")
    seed: Seed = Field(0, description="the same seed and recipe give the same metrics")
    threads: Natural = Field(0, description="CPU threads; 0 leaves it to PyTorch")
    world: Literal["desk", "files"] = Field("desk", description="the built-in support desk, or the files in `[data]`")
    desk: Desk = Desk()
    data: Data = Data()
    model: Model = Model()
    sft: Sft = Sft()
    pairs: Pairs = Pairs()
    reward: Reward = Reward()
    policy: Policy = Policy()
    evaluate: Evaluate = Evaluate()
    trace: Trace = Trace()
    checkpoint: Checkpoint = Checkpoint()


@dataclass(frozen=True)
class Key:
    """One key of a recipe: its dotted name, what it may be, its default and what it means."""

    name: str
    kind: type
    allowed: str
    default: Any
    meaning: str


@cache
def keys() -> Mapping[str, Key]:
    """Every key of a recipe by dotted name, in the order of the sections."""
    return {key.name: key for key in _keys(Recipe, "")}


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the TOML file at `path` with `key=value` overrides.

    Relative paths in the file start at its folder, those in overrides at the working directory.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError(Problem(str(path), "there is no such recipe", "give the path of a TOML file")) from None
    except UnicodeDecodeError:
        raise InputError(Problem(str(path), "is not UTF-8 text", "give the path of a TOML file")) from None
    return parse(text, overrides, source=str(path), folder=path.parent)


def parse(text: str, overrides: Sequence[str] = (), *, source: str = "recipe", folder: Path | None = None) -> Recipe:
    """The recipe in TOML `text`; `source` names it in errors, relative paths in it start at `folder`."""
    try:
        given = tomllib.loads(text)
    except ValueError as error:
        line = re.search(r"\(at line (\d+)", str(error))
        where = f"{source}:{line[1]}" if line else source
        remedy = 'a recipe has [sections] and lines such as name = "text" or steps = 36'
        raise InputError(Problem(where, f"not readable as TOML: {error}", remedy)) from None
    return _build(given, overrides, source, lines=_lines(text), folder=folder)


def build(given: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "recipe") -> Recipe:
    """A recipe from nested settings and `key=value` overrides; every problem found is raised in one `InputError`."""
    return _build(given, overrides, source, lines={}, folder=None)


def missing_files(recipe: Recipe, source: str = "recipe") -> list[Problem]:
    """What the recipe names that is not on disk."""
    paths = {f"data.{name}": path for name, path in recipe.data if isinstance(path, Path)}
    if recipe.model.init != "scratch":
        paths["model.init"] = Path(recipe.model.init)
    remedy = "correct the path; it starts at the recipe's folder, or with --set where you are"
    return [
        Problem(f"{source}: {key}", f"there is no {str(path)!r}", remedy)
        for key, path in paths.items()
        if not path.exists()
    ]


def _build(
    given: Mapping[str, Any], overrides: Sequence[str], source: str, *, lines: Mapping[str, int], folder: Path | None
) -> Recipe:
    settings = dict(given) if folder is None else _anchored(given, folder)
    flags: dict[str, str] = {}
    problems: list[Problem] = []
    for override in overrides:
        key, value = _parsed(override)
        if isinstance(value, Problem):
            problems.append(value)
        else:
            settings = _with(settings, key.split("."), value)
            flags[key] = f"--set {_cut(override)}"

    def place(key: str) -> str:
        """Where the user wrote `key`, or the table that holds it."""
        if key in flags:
            return flags[key]
        parts = key.split(".")
        line = next((lines[held] for end in range(len(parts), 0, -1) if (held := ".".join(parts[:end])) in lines), None)
        return f"{source}: {key}" if line is None else f"{source}:{line}: {key}"

    try:
        recipe = Recipe.model_validate(settings)
    except ValidationError as error:
        problems += [_explain(detail, place) for detail in error.errors()]
    else:
        problems += [Problem(place(key), what, remedy) for key, what, remedy in _inconsistent(recipe)]
    if problems:
        raise InputError(problems)
    return recipe


def _parsed(override: str) -> tuple[str, Any]:
    """The key and value of `key=value`, or the key and a `Problem`."""
    name, equals, raw = override.partition("=")
    name, where = name.strip(), f"--set {_cut(override)}"
    if not equals:
        return name, Problem(where, "has no '='", "write --set section.key=value")
    key = keys().get(name)
    if key is not None:
        return name, _literal(raw.strip(), key.kind)
    parts = name.split(".")
    if not all(parts):
        return name, Problem(where, "names no key", "write --set section.key=value")
    for end in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:end]) in keys():
            whole = ".".join(parts[:end])
            return name, Problem(where, f"{whole} is a value, not a section", f"write --set {whole}=value")
    if _names_under(name):
        return name, Problem(where, f"{name} is a section", f"set one of its keys: {', '.join(_names_under(name))}")
    return name, _unknown(where, name)


def _literal(raw: str, kind: type) -> Any:
    """What the text after '=' means for a key of type `kind`; what does not fit stays text and is refused later."""
    if kind is Path:
        return Path(raw).expanduser().absolute() if raw else raw
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except ValueError:
        value = raw
    if kind is str:
        return value if isinstance(value, str) else raw
    if kind is float and isinstance(value, str):
        try:
            return float(value)  # .5 and 1. are numbers to people, though not to TOML
        except ValueError:
            return value
    return value


def _with(settings: dict[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of nested `settings` in which `path` leads to `value`; what is not a table is left to be refused."""
    head, *rest = path
    if not rest:
        return {**settings, head: value}
    inner = settings.get(head, {})
    return {**settings, head: _with(inner, rest, value)} if isinstance(inner, dict) else settings


def _anchored(given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Nested settings in which relative paths start at `folder`."""
    settings = dict(given)
    for key in keys().values():
        section, _, name = key.name.rpartition(".")
        table = settings.get(section)
        if not isinstance(table, dict) or not isinstance(text := table.get(name), str) or not text:
            continue
        if key.kind is Path or (key.name == "model.init" and text != "scratch"):
            settings[section] = {**table, name: str((folder / Path(text).expanduser()).absolute())}
    return settings


def _lines(text: str) -> dict[str, int]:
    """The line on which each table and key of a TOML text is written, as far as a line tells by itself."""
    found: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if table := re.match(r"\s*\[\s*([\w.\- ]+?)\s*\]", line):
            section = table[1].replace(" ", "") + "."
            found.setdefault(section[:-1], number)
        elif key := re.match(r"\s*([\w.\-]+)\s*=", line):
            found.setdefault(section + key[1], number)
    return found


def _explain(detail: Any, place: Callable[[str], str]) -> Problem:
    name = ".".join(str(part) for part in detail["loc"])
    where = place(name)
    if detail["type"] == "extra_forbidden":
        return _unknown(where, name)
    key, given = keys().get(name), _shown(detail["input"])
    if key is None:
        return Problem(where, f"{given} is not a section", f"write [{name}] and its keys below it")
    default = "it may be left out" if key.default is None else f"the default is {_shown(key.default)}"
    return Problem(where, f"{given} is not allowed: expected {key.allowed}", default)


def _unknown(where: str, name: str) -> Problem:
    """No such key: the nearest one in the same section, else one of that name elsewhere, else all that there are."""
    section, _, last = name.rpartition(".")
    known = _names_under(section)
    if not known:
        return _unknown(where, section)
    elsewhere = [key for key in keys() if key.rpartition(".")[2] == last]
    close = difflib.get_close_matches(last, known, n=1, cutoff=0.6)
    near = [f"{section}.{close[0]}" if section else close[0]] if close else elsewhere[:3]
    near = near or difflib.get_close_matches(name, [*keys(), *known], n=1, cutoff=0.7)
    remedy = f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(known)}"
    return Problem(where, f"there is no key {name}", remedy)


def _names_under(section: str) -> list[str]:
    """The keys and sections directly inside `section` ('' is the whole recipe); none if there is no such section."""
    start = f"{section}." if section else ""
    return list(dict.fromkeys(key.removeprefix(start).split(".")[0] for key in keys() if key.startswith(start)))


def _keys(section: type[BaseModel], start: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{start}{name}.")
        else:
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            plain = str if choices else kind if isinstance(kind, type) else Path
            allowed = " or ".join(f'"{choice}"' for choice in choices) or _allowed(plain, field.metadata)
            yield Key(start + name, plain, allowed, field.default, field.description or "")


def _allowed(kind: type, metadata: Sequence[Any]) -> str:
    """What a value may be, in words, from its type and its constraints."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}[kind]
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [
        f"{sign} {bound}"
        for rule in metadata
        for name, sign in signs.items()
        if (bound := getattr(rule, name, None)) is not None
    ]
    if any(getattr(rule, "pattern", None) for rule in metadata):
        words += " of letters, digits, '.', '_' and '-', beginning with a letter or digit"
    return f"{words} {' and '.join(bounds)}".strip()


def _shown(value: Any) -> str:
    """A value as the user would write it."""
    if isinstance(value, bool):
        return str(value).lower()
    return _cut(f'"{value}"' if isinstance(value, str) else str(value))


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


def _inconsistent(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """What no single key shows to be wrong: the key, what is wrong with it, what to do."""
    yield from _bad_sizes(recipe)
    yield from _bad_world(recipe)
    episodes = recipe.policy.prompts_per_step * recipe.policy.samples_per_prompt
    if recipe.policy.kl.mode == "adaptive" and recipe.policy.kl.horizon <= 0.2 * episodes:
        what = f"{recipe.policy.kl.horizon:g} is too short for {episodes} responses a step: beta would turn negative"
        yield "policy.kl.horizon", what, f"use more than {0.2 * episodes:g}, such as 10000"
    if recipe.policy.kl.mode == "adaptive" and recipe.policy.kl.beta == 0:
        what = "0 stays 0 in adaptive mode, which multiplies it"
        yield "policy.kl.beta", what, "start above 0, such as 0.05"


def _bad_sizes(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    model, policy = recipe.model, recipe.policy
    if model.init == "scratch":
        # A Llama turns pairs of coordinates in each head, so a head's width is even.
        step = model.heads * (2 if model.family == "llama" else 1)
        if model.hidden % step:
            nearest = math.ceil(model.hidden / step) * step
            what = f"{model.hidden} is not a multiple of {step} (model.heads = {model.heads}, {model.family})"
            yield "model.hidden", what, f"such as {nearest}"
        if policy.max_new_tokens >= model.context:
            what = f"{policy.max_new_tokens} leaves no room for a prompt in model.context = {model.context}"
            yield "policy.max_new_tokens", what, "lower it or raise model.context"
    batch = policy.prompts_per_step * policy.samples_per_prompt
    if policy.minibatches > batch:
        yield "policy.minibatches", f"{policy.minibatches} is more than the {batch} responses of a step", "lower it"
    if recipe.pairs.checkpoints > recipe.sft.steps:
        what = f"{recipe.pairs.checkpoints} is more than sft.steps = {recipe.sft.steps}"
        yield "pairs.checkpoints", what, "lower it"


def _bad_world(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    data = recipe.data
    if recipe.world == "desk":
        for name, value in data:
            if value != Data.model_fields[name].default:
                yield f"data.{name}", "is not read: the run takes the built-in desk", 'set world = "files"'
        return
    if recipe.desk != Desk():
        yield "desk", "is not read: the run takes the files in [data]", 'remove it, or set world = "desk"'
    if data.preferences is None:
        what = 'is missing: world = "files" needs human preferences, no annotator is built in for it'
        yield "data.preferences", what, "name a file with prompt, chosen and rejected columns"
    if data.demonstrations is None and recipe.model.init == "scratch":
        what = "is missing: a model from scratch has to learn from demonstrations first"
        yield "data.demonstrations", what, "name a file of prompts and responses, or a model folder in model.init"
