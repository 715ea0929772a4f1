"""Making the runs: a base run per seed, and forks of it that a fault, a benign change or nothing at all sets apart.

Everything is made once and left alone afterwards, so that a study that was stopped goes on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from desk_runs import DESK, carry_out, side_by_side

from faults.faults import BENIGN, FAULTS, SEVERITIES, STEPS, TUNING_SEEDS, Dose, onset
from faults.patches import evaluating
from faults.rewards import Beside

WORLD = ("threads=1", "desk.annotators.length=0")
BASE = (
    f"policy.steps={STEPS}",
    "policy.prompts_per_step=96",
    "policy.lr=3e-4",
    "policy.final_lr=0.5",
    "policy.lam=1.0",
    "policy.kl.beta=0.3",
    "evaluate.every=4",
    "trace.text=full",
    "trace.probes_every=3",
    "checkpoint.every=2",
    "checkpoint.keep=100",
)
ALONE = ("checkpoint.every=1000", "checkpoint.keep=1")  # nothing leaves a fork
EVALUATED = 192  # prompts
ANSWERS = 512  # of the reference, on which an edited reward model is normalised
DONE = "done.json"

Kind = Literal["base", "fault", "benign"]


@dataclass(frozen=True)
class Case:
    """One run of the study."""

    kind: Kind
    name: str
    severity: str  # of a fault, else empty
    seed: int
    out: Path

    def __str__(self) -> str:
        return f"{self.name}-{self.severity or self.kind}-{self.seed}"

    @property
    def onset(self) -> int:
        """Policy steps done before it differs from its base; 0 for the base."""
        return 0 if self.kind == "base" else onset(self.name, self.severity, self.seed)

    @property
    def folder(self) -> Path:
        return self.out / f"seed-{self.seed}" / f"{self.name}-{self.severity or self.kind}"

    @property
    def base(self) -> Path:
        return self.out / f"seed-{self.seed}" / "base-base"

    @property
    def start(self) -> Path:
        return self.out / f"seed-{self.seed}" / "start"

    @property
    def view(self) -> Path:
        return self.out / "views" / f"{self}.json.gz"

    @property
    def dose(self) -> Dose:
        if self.kind == "base":
            return Dose()
        if self.kind == "benign":
            return next(one.dose for one in BENIGN if one.name == self.name)
        return next(one for one in FAULTS if one.name == self.name).dose(self.severity)  # type: ignore[arg-type]


def cases(seeds: Iterable[int], out: Path) -> list[Case]:
    """The runs of some seeds, bases first, strong faults before mild ones; held-out faults under no tuning seed."""
    found = []
    for seed in seeds:
        one = partial(Case, seed=seed, out=out)
        faults = [fault for fault in FAULTS if not (fault.held_out and seed in TUNING_SEEDS)]
        found.append(one("base", "base", ""))
        found += [one("fault", fault.name, severity) for severity in SEVERITIES for fault in faults]
        found += [one("benign", benign.name, "") for benign in BENIGN]
    return found


def make(wanted: Sequence[Case], workers: int) -> None:
    """Carry out `wanted` with all that they need."""
    side_by_side(begin, list({case.seed: case for case in wanted}.values()), workers)
    needed = {(case.seed, case.dose.reward.beside): case for case in wanted if case.dose.reward}
    side_by_side(train_beside, [case for (_, beside), case in needed.items() if beside], workers)
    side_by_side(fork, [case for case in wanted if case.kind != "base"], workers)


def begin(case: Case) -> None:
    """The supervised policy, the reward model and the base run of the case's seed."""
    settings = (f"seed={case.seed}", *WORLD)
    carry_out("sft", DESK, case.start, settings)
    carry_out("reward", DESK, case.start, settings)
    with evaluating(EVALUATED)():
        carry_out("policy", DESK, case.base, (*settings, *BASE), start=case.start)
    finish(case.base)


def train_beside(case: Case) -> None:
    """The reward model beside the run's own that the case needs."""
    change = case.dose.reward
    assert change is not None and change.beside is not None
    folder = _beside(case, change.beside)
    if not (folder / "reward.done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        carry_out(
            "reward",
            DESK,
            folder,
            (f"seed={case.seed}", *WORLD, *change.beside.settings),
            start=_without_reward(case.start, folder.with_name(f"{folder.name}-start")),
        )


def fork(case: Case) -> None:
    """The case's run, a fork of its base."""
    from kedge.errors import DivergenceError, InputError
    from kedge.experiment.fork import Fork, carry_out
    from kedge.progress import Interrupt, Progress

    if (case.folder / DONE).exists():
        return
    dose, ended = case.dose, ""
    source = case.base if dose.reward is None else _dressed(case)
    begun = Fork(source, case.onset, (*dose.settings, *ALONE), STEPS - case.onset, dose.branch)
    with evaluating(EVALUATED)(), dose.patch() if dose.patch else nullcontext():
        try:
            carry_out(begun, case.folder, progress=Progress(quiet=True), interrupt=Interrupt())
        except (DivergenceError, InputError) as error:  # a fault may end its run; what there is of it counts
            if not (case.folder / "recipe.json").exists():
                raise
            ended = str(error)
    if source != case.base:
        shutil.rmtree(source)
    finish(case.folder, ended)


def finish(folder: Path, ended: str = "") -> None:
    """Mark a run as made."""
    (folder / DONE).write_text(json.dumps({"ended": ended}) + "\n", encoding="utf-8")


def _beside(case: Case, beside: Beside) -> Path:
    return case.start.with_name(f"reward-{beside.name}")


def _without_reward(start: Path, out: Path) -> Path:
    """`start` as it was before its reward model."""
    shutil.rmtree(out, ignore_errors=True)
    _linked(start, out, left_out="reward")
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    _write(out / "manifest.json", json.dumps({**manifest, "stages": {"sft": "done"}}))
    return out


def _dressed(case: Case) -> Path:
    """The base with another reward model in its folder, from which the case's fork takes it."""
    from transformers import AutoTokenizer

    from kedge.models.reward import load_reward_model, save_reward_model

    change = case.dose.reward
    assert change is not None
    out = case.folder.with_name(f"{case.folder.name}-source")
    shutil.rmtree(out, ignore_errors=True)
    _linked(case.base, out, left_out="reward")
    own = load_reward_model(case.start / "models/reward")
    others = {}
    if change.beside is not None:
        others[change.beside.name] = load_reward_model(_beside(case, change.beside) / "models/reward")
    edited = change.edit(own, others, _reference_answers(case))
    save_reward_model(edited, AutoTokenizer.from_pretrained(case.start / "models/reward"), out / "models/reward")
    return out


def _reference_answers(case: Case) -> Any:
    """Answers of the supervised policy, as rollouts."""
    from kedge import recipe as recipes
    from kedge.data.tokenise import encode_prompt
    from kedge.models.load import load_policy
    from kedge.pipeline.tasks import inputs_of
    from kedge.rollout.engine import TorchEngine
    from kedge.rollout.given import as_prompts
    from kedge.structs import Sampling
    from kedge.train.schedule import seeded

    recipe = recipes.load(DESK, (f"seed={case.seed}", *WORLD))
    inputs = inputs_of(recipe)
    token = inputs.tokenizer
    rows = [encode_prompt(token, prompt) for prompt in inputs.task.prompts.rows[:ANSWERS]]
    policy, _ = load_policy(case.start / "models/sft")
    engine = TorchEngine(token.eos_token_id, token.pad_token_id)
    sampling = Sampling(recipe.policy.max_new_tokens, recipe.policy.temperature)
    return engine.generate(policy, as_prompts(rows, token.pad_token_id), sampling, seeded(case.seed, "normalise"))


def _linked(source: Path, out: Path, left_out: str) -> None:
    """A copy of a run that shares its files, without the model `left_out`."""
    shutil.copytree(source, out, copy_function=os.link, ignore=shutil.ignore_patterns(left_out))


def _write(path: Path, text: str) -> None:
    """A file of its own in the place of one that is shared."""
    path.unlink()
    path.write_text(text + "\n", encoding="utf-8")
