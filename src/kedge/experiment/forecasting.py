"""A forecast for model folders or for a run: answers drawn and scored, the path of each reward model, what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kedge.diagnose.features import FEATURES
from kedge.errors import InputError, Problem
from kedge.experiment.answers import Answers, Asked, context_of, drawn, loaded_policy, prompts_in, prompts_of
from kedge.experiment.forecast import Forecast, Interval, Leaving, Place, exploits, forecast, rank, supported_end
from kedge.experiment.fork import source_recipe
from kedge.pipeline.tasks import inputs_of
from kedge.progress import Interrupt, Progress
from kedge.structs import Sampling
from kedge.trace.run_dir import RunDir

EXPLOITS = 6
COMMON = 1.0  # nats at which reward models are compared, where all paths reach it
PATH_NOTE = (
    "A policy in training spends more KL than this path for the same change: read it by the score gained, or as the "
    "most that a KL can do. It foresees no answer that is not among the samples, so errors that training itself brings "
    "are not in it."
)


@dataclass(frozen=True)
class Request:
    """What to forecast: answers per prompt, betas to look at, features beside the usual ones, and how to sample."""

    samples: int = 64
    betas: tuple[float, ...] = ()
    features: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    most: int = 150  # prompts
    seed: int = 0


def of_folders(
    policy: Path, rewards: Sequence[Path], prompts: Path, request: Request, progress: Progress, interrupt: Interrupt
) -> dict[str, Any]:
    """The forecast for a policy, one or more reward models and a file of prompts."""
    model, tokenizer = loaded_policy(policy)
    context, budget = context_of(model), request.max_new_tokens or 48
    asked = prompts_in(prompts, tokenizer, context=context, max_new_tokens=budget, most=request.most)
    answers = drawn(
        model,
        tokenizer,
        asked,
        _names(rewards),
        count=request.samples,
        sampling=Sampling(budget),
        seed=request.seed,
        progress=progress,
        interrupt=interrupt,
    )
    return {"policy": str(policy)} | forecasts(answers, request, asked)


def of_run(
    run: Path, rewards: Sequence[Path], request: Request, progress: Progress, interrupt: Interrupt
) -> dict[str, Any]:
    """The forecast for a run's supervised policy, its reward model (or `rewards`) and its evaluation prompts."""
    answers, asked, betas = answers_of_run(run, rewards, request, progress, interrupt)
    request = request if request.betas else Request(**{**vars(request), "betas": betas})
    return {"policy": str(RunDir(run).models / "sft")} | forecasts(answers, request, asked)


def answers_of_run(
    run: Path, rewards: Sequence[Path], request: Request, progress: Progress, interrupt: Interrupt
) -> tuple[Answers, Asked, tuple[float, ...]]:
    """The answers, the prompts, and the betas of the run's recipe."""
    recipe, folder = source_recipe(run), RunDir(run)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    for name in ("sft", *(() if rewards else ("reward",))):
        if not (folder.models / name).is_dir():
            what, remedy = "the run has no such model yet", f"run `kedge {name}` on its recipe first"
            raise InputError(Problem(str(folder.models / name), what, remedy))
    inputs = inputs_of(recipe)
    model, _ = loaded_policy(folder.models / "sft", trust_remote_code=recipe.model.trust_remote_code)
    asked = prompts_of(inputs.task.evaluation.rows, inputs.tokenizer, request.most)
    budget = request.max_new_tokens or recipe.policy.max_new_tokens
    longest = max(map(len, asked.ids)) + budget
    if longest > context_of(model):
        what = f"{longest} tokens with the longest prompt; the context is {context_of(model)}"
        raise InputError(Problem(f"--max-new-tokens {budget}", what, "lower it"))
    answers = drawn(
        model,
        inputs.tokenizer,
        asked,
        _names(rewards or [folder.models / "reward"]),
        count=request.samples,
        sampling=Sampling(budget, recipe.policy.temperature),
        seed=recipe.seed + request.seed,
        progress=progress,
        interrupt=interrupt,
    )
    betas = (recipe.policy.kl.beta,) if recipe.policy.kl.mode == "fixed" and recipe.policy.kl.beta else ()
    return answers, asked, betas


def _names(rewards: Sequence[Path]) -> dict[str, Path]:
    """Folders by the shortest ends of their paths that tell them apart."""
    if len({folder.resolve() for folder in rewards}) < len(rewards):
        raise InputError(Problem("--reward", "names the same folder twice", "name each reward model once"))
    parts = [folder.resolve().parts for folder in rewards]
    depth = next(n for n in range(1, 99) if len({part[-n:] for part in parts}) == len(parts))
    return {"/".join(part[-depth:]): folder for part, folder in zip(parts, rewards, strict=True)}


def forecasts(answers: Answers, request: Request, asked: Asked) -> dict[str, Any]:
    """Every reward model's forecast as JSON, the ranking where there are several, and `lines` for people."""
    features = answers.features(request.features)
    common = min(COMMON, *(supported_end(scores) for scores in answers.scores.values()))
    found = [
        forecast(name, scores, features, betas=request.betas, common=common) for name, scores in answers.scores.items()
    ]
    counts = {"prompts": len(answers.prompts), "answers": request.samples, "left_out": list(asked.left_out)}
    result: dict[str, Any] = {
        **counts,
        "notes": [*answers.notes, PATH_NOTE],
        "forecasts": [_described(one, answers) for one in found],
    }
    if len(found) > 1:
        result["common_kl"] = common
        result["ranking"] = rank(found, tuple(FEATURES))
    return result | {"lines": lines(result)}


def _described(one: Forecast, answers: Answers) -> dict[str, Any]:
    return {
        "reward": one.reward,
        "spread": one.spread,
        "support": {"kl": one.end, "least_beta": one.least_beta, "effective": one.path[-1].effective},
        "reference": {name: value.to_dict() for name, value in one.start.values.items()},
        "stations": [_place(place) for place in one.stations],
        "end": _place(one.path[-1]),
        "path": [_place(place) for place in one.path],
        "betas": [
            {"beta": beta, "status": "not_checked", "reason": place}
            if isinstance(place, str)
            else {"status": "ok", **_place(place), "beta": beta}
            for beta, place in one.betas.items()
        ],
        "advice": advice(one),
        "leaving": [vars(leaving) for leaving in one.leaving],
        "runaway": {"slope": one.slope.to_dict(), "beta": one.runaway.to_dict()},
        "not_checked": dict(one.unknown),
        "standardised": dict(one.standardised),
        "exploits": _exploits(one, answers),
    }


def _place(place: Place) -> dict[str, Any]:
    return {
        "kl": place.kl,
        "beta": place.beta,
        "score": place.score,
        "effective": place.effective,
        "values": {name: value.to_dict() for name, value in place.values.items()},
        "changes": {name: change.to_dict() for name, change in place.changes.items()},
    }


def _exploits(one: Forecast, answers: Answers) -> list[dict[str, Any]]:
    at = one.stations[-1] if one.stations else one.path[-1]
    return [
        {
            "prompt": answers.prompts[found.prompt],
            "answer": answers.texts[found.prompt][found.answer],
            "score": found.score,
            "times": found.times,
            "usual": answers.texts[found.prompt][found.usual],
            "usual_score": found.usual_score,
            "kl": at.kl,
        }
        for found in exploits(answers.scores[one.reward], at, EXPLOITS)
    ]


# Words


def advice(one: Forecast) -> list[str]:
    """What the path says about beta, in the unit of the reward per nat."""
    said = [_left(one, leaving) for leaving in one.leaving]
    return [*said, *_runaway(one)]


def _left(one: Forecast, leaving: Leaving) -> str:
    band = f"{max(0.0, leaving.low):.3g} to {leaving.high:.3g}, where an evaluation of the reference would find it,"
    if leaving.feature == "length":
        band = f"25% around the reference's {one.start.values['length'].value:.3g} tokens"
    if leaving.beta is None or leaving.kl is None:
        return f"{leaving.feature} stays within {band} down to beta {one.least_beta:.3g} ({one.end:.2g} nats)"
    way = "upwards" if leaving.direction > 0 else "downwards"
    return f"{leaving.feature} leaves {band} {way} below beta {leaving.beta:.3g} (at {leaving.kl:.2g} nats)"


def _runaway(one: Forecast) -> list[str]:
    if not (one.runaway.low > 0):
        return []
    return [
        f"the score pays {one.slope.value:.3g} per token within a prompt: the runaway number (slope x reference length "
        f"/ beta) is 1 at beta {one.runaway.value:.3g} ({one.runaway.low:.3g} to {one.runaway.high:.3g}), below which "
        "a linear pay for length has no end"
    ]


def lines(result: Mapping[str, Any]) -> list[str]:
    """What a forecast says to people."""
    shown = [f"{result['prompts']} prompts, {result['answers']} answers each"]
    if result["left_out"]:
        shown.append(f"{len(result['left_out'])} rows left out, the first: {result['left_out'][0]}")
    for one in result["forecasts"]:
        shown += ["", *_lines_of(one)]
    if "ranking" in result:
        shown += ["", f"reward models by how far they push style at {result['common_kl']:.2g} nats, least first"]
        shown += [
            f"  {row['reward']}: {row['furthest']} by {row['change']:+.2f} of the spread between answers"
            for row in result["ranking"]
        ]
    return [*shown, "", *result["notes"]]


def _lines_of(one: Mapping[str, Any]) -> list[str]:
    support = one["support"]
    names = list(one["reference"])
    width = max([12, *(len(name) + 1 for name in names)])
    head = "".join(f"{name:>{width}}" for name in names)
    shown = [
        f"{one['reward']}: supported up to {support['kl']:.2f} nats (beta {support['least_beta']:.3g})",
        f"{'KL':>5} {'beta':>7} {'score':>7}{head}",
        f"{0:>5} {'-':>7} {0:>7.2f}" + "".join(f"{one['reference'][name]['value']:>{width}.3f}" for name in names),
    ]
    for place in (*one["stations"], one["end"]):
        cells = "".join(f"{_cell(place, name):>{width}}" for name in names)
        shown.append(f"{place['kl']:>5.2f} {place['beta']:>7.3g} {place['score']:>+7.2f}{cells}")
    shown.append("* the interval of the change from the reference excludes 0")
    for row in one["betas"]:
        shown.append(_beta_line(row, names))
    shown += [f"- {sentence}" for sentence in one["advice"]]
    shown += [f"- {name} not checked: {why}" for name, why in one["not_checked"].items()]
    shown.append("what it likes best, against a usual answer:")
    for found in one["exploits"][:3]:
        shown += [
            f"  {_short(found['prompt'])}",
            f"    {found['score']:+.2f} ({found['times']:.0f} times as likely)  {_short(found['answer'])}",
            f"    {found['usual_score']:+.2f}  {_short(found['usual'])}",
        ]
    return shown


def _beta_line(row: Mapping[str, Any], names: Sequence[str]) -> str:
    if row["status"] != "ok":
        return f"beta {row['beta']:g} not checked: {row['reason']}"
    moved = [f"{name} {row['values'][name]['value']:.3g}" for name in names if _moved(row["changes"][name])]
    return (
        f"beta {row['beta']:g}: the optimum is {row['kl']:.2f} nats away, score {row['score']:+.2f}, {', '.join(moved)}"
    )


def _cell(place: Mapping[str, Any], name: str) -> str:
    mark = "*" if _moved(place["changes"][name]) else " "
    return f"{place['values'][name]['value']:.3f}{mark}"


def _moved(change: Mapping[str, float]) -> bool:
    return Interval(**change).excludes()


def _short(text: str, width: int = 110) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= width else f"{text[: width - 3]}..."
