"""The ledger of a run by groups: one pass over its steps, one step in memory at a time.

What is kept are sums over groups, products over bunches of prompts and a bounded list of phrases, so memory does not
grow with the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.groups import Grouping
from kedge.diagnose.phrases import Phrase, PhraseTally
from kedge.diagnose.push import Measure, Push, Tally, mix_note, pushes
from kedge.diagnose.split import CENTRING, Entry, Gap, Split, centring, gap, split
from kedge.errors import InputError, Problem
from kedge.trace.reader import Run, StepTrace

Array = NDArray[Any]
SIGNS = ("below 0", "above 0")


@dataclass(frozen=True)
class Account:
    """Sums over the tokens of G groups, in the advantage's unit; the last axis of signed sums is SIGNS."""

    grouping: str
    note: str
    labels: tuple[str, ...]  # [G]
    tokens: Array  # [G]
    responses: Array  # [G] with a token in the group
    ungrouped: int  # tokens in no group
    advantage: Array  # [G] accumulated apart from its parts
    sums: Mapping[Entry, Array]  # [G] each
    signed_tokens: Array  # [G, 2] tokens by the sign of their advantage
    silenced_tokens: Array  # [G, 2] of them, those whose gradient the clip held back in the last epoch
    silenced: Array  # [G, 2] their advantage
    moved: Array  # [G] nats: sum of log pi_new - log pi_old

    def per_token(self, sums: Array) -> Array:
        """[G] means over tokens; nan without any."""
        return _over(sums, self.tokens)

    def per_response(self, sums: Array) -> Array:
        """[G] means over responses of what is summed over their tokens; nan without any."""
        return _over(sums, self.responses)

    @property
    def reached(self) -> Array:
        """[G] the advantage that was not silenced."""
        return np.asarray(self.advantage - self.silenced.sum(axis=-1))


@dataclass(frozen=True)
class Survey:
    """All that one pass over a run's steps told."""

    steps: tuple[int, ...]
    responses: int
    tokens: int
    gap: Gap  # the largest of any step
    worst_step: int  # at which the parts miss the advantage most
    centring: str  # a key of CENTRING; "mixed" where steps differ
    unit: str  # of the advantage
    notes: tuple[str, ...]
    accounts: tuple[Account, ...]
    pushes: tuple[Push, ...]
    phrases: tuple[Phrase, ...]


def survey(
    run: Run,
    groupings: Sequence[Grouping] = (),
    measures: Sequence[Measure] = (),
    *,
    phrases: PhraseTally | None = None,
    since: int = 0,
    watch: Callable[[Iterable[int]], Iterable[int]] = lambda steps: steps,
) -> Survey:
    """Read the steps of `run` from `since` on, once.

    `watch` wraps the steps for a progress bar. Raises `InputError` where there are none, or where one does not fit its
    digest.
    """
    steps = tuple(step for step in run.steps() if step >= since)
    if not steps:
        raise InputError(_no_steps(run, since))
    tallies = [_Sums(grouping) for grouping in groupings]
    covariances = [Tally(measure) for measure in measures]
    so_far = _SoFar()
    for number in watch(steps):
        step = run.step(number)
        rows = split(step)
        so_far.add(step, rows)
        for tally in tallies:
            tally.add(step, rows)
        for covariance in covariances:
            covariance.add(step, rows)
        if phrases is not None:
            phrases.add(step, rows)
    found = () if phrases is None else phrases.result()
    return so_far.survey(steps, tuple(tally.account() for tally in tallies), pushes(covariances), found)


def account(run: Run, grouping: Grouping, *, since: int = 0) -> Account:
    """The ledger of a run cut in one way."""
    return survey(run, [grouping], since=since).accounts[0]


def _no_steps(run: Run, since: int) -> Problem:
    there = run.steps()
    if there:
        return Problem(f"--since {since}", f"the last step on disk is {there[-1]}", "give an earlier step")
    remedy = "methods that learn from pairs leave none; a run in progress has them after its first step"
    return Problem(str(run.path), "holds no rows of policy steps", remedy)


@dataclass
class _SoFar:
    """What is known of a run after the steps read."""

    responses: int = 0
    tokens: int = 0
    gap: Gap = field(default_factory=lambda: Gap(0.0, 0.0, 0.0))
    worst: tuple[float, int] = (-1.0, 0)
    kinds: set[str] = field(default_factory=set)
    units: dict[str, None] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)

    def add(self, step: StepTrace, rows: Split) -> None:
        self.responses += len(step)
        self.tokens += int(step.response_mask.sum())
        here = gap(step, rows)
        self.gap = self.gap.worse(here)
        self.worst = max(self.worst, (max(here.token, here.excess), step.step), key=lambda pair: pair[0])
        self.kinds.add(centring(step))
        self.units[_unit(step)] = None
        if note := mix_note(step):
            self.notes[note] = None

    def survey(
        self, steps: tuple[int, ...], accounts: tuple[Account, ...], found: tuple[Push, ...], said: tuple[Phrase, ...]
    ) -> Survey:
        kind = next(iter(self.kinds)) if len(self.kinds) == 1 else "mixed"
        return Survey(
            steps=steps,
            responses=self.responses,
            tokens=self.tokens,
            gap=self.gap,
            worst_step=self.worst[1],
            centring=kind,
            unit=" or ".join(self.units),
            notes=(CENTRING.get(kind, "channels are predicted differently in different steps"), *self.notes),
            accounts=accounts,
            pushes=found,
            phrases=said,
        )


class _Sums:
    """The sums of one grouping so far."""

    def __init__(self, grouping: Grouping) -> None:
        self._grouping = grouping
        self._count = count = len(grouping.labels)
        self._sums: dict[Entry, Array] = {}
        self._tokens, self._responses, self._advantage, self._moved = np.zeros((4, count))
        self._signed, self._silenced_tokens, self._silenced = np.zeros((3, count, 2))
        self._ungrouped = 0

    def add(self, step: StepTrace, rows: Split) -> None:
        """Add the tokens of a step."""
        mask = step.response_mask
        number = self._grouping.of(step)
        cells = np.broadcast_to(number[:, None] if number.ndim == 1 else number, mask.shape)
        inside = mask & (cells >= 0)
        self._ungrouped += int((mask & (cells < 0)).sum())
        cell = cells[inside]
        if not len(cell):
            return
        for entry, values in zip(rows.entries, rows.tokens[inside].T, strict=True):
            found = self._total(cell, values)
            self._sums[entry] = self._sums[entry] + found if entry in self._sums else found
        advantage = step.advantage()[inside]
        change = (step.tokens["new_logprob"].astype(np.float64) - step.tokens["old_logprob"])[inside]
        self._tokens += np.bincount(cell, minlength=self._count)
        self._advantage += self._total(cell, advantage)
        self._moved += self._total(cell, change)
        seen = np.unique(np.nonzero(inside)[0] * self._count + cell) % self._count
        self._responses += np.bincount(seen, minlength=self._count)
        if "active" in step.absent:  # once not known, the sums are not either
            self._silenced_tokens[:] = self._silenced[:] = np.nan
        silent = ~step.active[inside]
        for sign, here in enumerate((advantage < 0, advantage > 0)):
            self._signed[:, sign] += np.bincount(cell[here], minlength=self._count)
            self._silenced_tokens[:, sign] += np.bincount(cell[here & silent], minlength=self._count)
            self._silenced[:, sign] += self._total(cell[here & silent], advantage[here & silent])

    def account(self) -> Account:
        """What they come to."""
        return Account(
            grouping=self._grouping.name,
            note=self._grouping.note,
            labels=self._grouping.labels,
            tokens=self._tokens,
            responses=self._responses,
            ungrouped=self._ungrouped,
            advantage=self._advantage,
            sums=self._sums,
            signed_tokens=self._signed,
            silenced_tokens=self._silenced_tokens,
            silenced=self._silenced,
            moved=self._moved,
        )

    def _total(self, cell: Array, values: Array) -> Array:
        return np.bincount(cell, weights=values, minlength=self._count)


def _unit(step: StepTrace) -> str:
    """What the advantage of a step is measured in."""
    if np.all(step.scale == 1):
        return "reward"
    return "standard deviations" if np.ptp(step.scale) == 0 else "deviations of the group's reward"


def _over(sums: Array, counts: Array) -> Array:
    return np.asarray(np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0))
