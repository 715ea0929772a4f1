"""Replay: rewards, advantages and update weights of logged rollouts under changed settings. Nothing is trained.

The rows of a trace become the structs of training again, and `train.experience.make_experience` and `ops` turn them
into advantages and weights as training does, once under the settings that were logged and once under the changed ones.
What that can tell and what not is in `validity`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from kedge.diagnose.features import FEATURES, Feature
from kedge.diagnose.ledger import reference_length
from kedge.diagnose.margin import Margin, Pairs, margin, probe_pairs
from kedge.errors import InputError, Problem
from kedge.experiment.replay.effects import Account, Covariance, Effect, Flips, ReplayedStep
from kedge.experiment.replay.judge import Judge
from kedge.experiment.replay.keys import BETA, Plan, plan_of, refusal
from kedge.experiment.replay.push import Push, push_of
from kedge.experiment.replay.result import Replay
from kedge.experiment.replay.rows import as_trace, experience_of
from kedge.experiment.replay.setting import Betas, changed_setting, logged_setting
from kedge.experiment.replay.validity import Statement, statements
from kedge.trace.reader import Run, StepTrace

__all__ = [
    "Covariance", "Effect", "Flips", "Plan", "Push", "Replay", "ReplayedStep", "Statement",
    "plan_of", "refusal", "replayed", "replayed_steps",
]  # fmt: skip

Steps = Callable[[], Iterator[StepTrace]]
_TAXED = {*BETA, "policy.length_penalty"}  # what the matched margin can follow, beside the score's slope


def replayed(
    source: Run | StepTrace,
    changes: Sequence[str] = (),
    *,
    reward: Path | None = None,
    features: Mapping[str, Feature] | None = None,
    first: int | None = None,
    last: int | None = None,
) -> Replay:
    """What `changes` (`key=value` of the recipe, or `score=residual_length`) would have done to the push of a run.

    `source` may be one step, of which nothing but its rows is known. `reward` is the folder of another reward model,
    `first` and `last` bound the policy steps. Raises `InputError` for what cannot be replayed.
    """
    run = source if isinstance(source, Run) else None
    plan = plan_of({} if run is None else run.settings, changes, reward=reward)
    steps = _chosen(source, first, last)
    judge = Judge(plan, steps, run)
    usual = None if run is None else reference_length(run)
    account = Account(FEATURES if features is None else features, "return" if plan.changes_return else "push", usual)
    betas: list[tuple[float, float]] = []
    one: ReplayedStep | None = None
    for one in _replayed(plan, steps, judge, run):
        account.add(one)
        betas.append((float(one.logged_setting.beta.mean()), float(one.changed_setting.beta.mean())))
    if one is None:
        raise InputError(Problem(_name(source), "holds no policy steps here", "see --from, --to and trace.keep"))
    effective = account.effective()
    mean = np.mean(betas, axis=0)
    return Replay(
        run=_name(source),
        changes=(*plan.changes, *(() if reward is None else (f"--reward {reward}",))),
        steps=tuple(account.steps),
        responses=account.responses,
        beta=(float(mean[0]), float(mean[1])),
        effects=account.effects(),
        flips=account.flips(),
        push_mean=account.pushes(),
        parts=account.parts(),
        margin=(None, None) if run is None else _margins(run, plan, judge, betas[-1][1], account.steps[-1]),
        effective=effective,
        active=account.active(),
        validity=statements(plan, one.logged, one.changed_setting, effective[1], slope=judge.slope),
    )


def replayed_steps(
    source: Run | StepTrace, plan: Plan, *, first: int | None = None, last: int | None = None
) -> Iterator[ReplayedStep]:
    """Each step as it was logged and as `plan` has it, one in memory at a time."""
    run = source if isinstance(source, Run) else None
    steps = _chosen(source, first, last)
    return _replayed(plan, steps, Judge(plan, steps, run), run)


def _replayed(plan: Plan, steps: Steps, judge: Judge, run: Run | None) -> Iterator[ReplayedStep]:
    betas = Betas(plan, run)
    return (_one(step, plan, betas, judge) for step in steps())


@torch.no_grad()
def _one(step: StepTrace, plan: Plan, betas: Betas, judge: Judge) -> ReplayedStep:
    before = logged_setting(step, plan.before)
    after = changed_setting(before, plan, betas, step)
    logged, changed = experience_of(step, before), experience_of(step, after, judge.of(step))
    pushes = push_of(step, logged, before), push_of(step, changed, after)
    trace = as_trace(step, changed, after, torch.from_numpy(pushes[1].active))
    return ReplayedStep(step, trace, before, after, *pushes)


def _chosen(source: Run | StepTrace, first: int | None, last: int | None) -> Steps:
    if isinstance(source, StepTrace):
        return lambda: iter([source])
    numbers = [step for step in source.steps() if (first is None or step >= first) and (last is None or step <= last)]
    return lambda: (source.step(number) for number in numbers)


def _name(source: Run | StepTrace) -> str:
    return source.name if isinstance(source, Run) else str(source.path)


def _margins(run: Run, plan: Plan, judge: Judge, beta: float, step: int) -> tuple[Margin | None, Margin | None]:
    """The net margin of the last probes before the replayed steps end, as logged and with what the plan changes."""
    found: Pairs | None = None
    for pairs in probe_pairs(run):
        found = pairs if pairs.step <= step + 1 else found
    if found is None:
        return None, None
    taxed = plan.keys & _TAXED
    if plan.reward is not None or replace(plan, keys=plan.keys - _TAXED, transform=None).changes_return:
        return margin(found), None
    changed = replace(
        found,
        beta=beta if taxed & set(BETA) else found.beta,
        penalty=plan.after.policy.length_penalty if "policy.length_penalty" in taxed else found.penalty,
        score=found.score - judge.slope * found.length,
    )
    return margin(found), margin(changed)
