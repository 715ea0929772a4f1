"""TRL's GRPO completions: with `log_completions=True`, `output_dir/completions/completions_{step:05d}.parquet`.

A file holds the newest generation batch at the time of a log: consecutive files may repeat rows, and with
`logging_steps` above 1 most rows are never written. An evaluation's log at the same step writes over the training's
file. Reward columns are raw: without their weights, and without the KL, which GRPO has in its loss.
Source: `GRPOTrainer.log` and `_generate_and_score_completions` of trl 1.16.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kedge.errors import InputError, Problem
from kedge.importers import Answers, Format, Intake, Question
from kedge.importers.questions import UNKNOWN, number
from kedge.importers.records import finite, first_record, groups, numbered, records
from kedge.importers.texts import NO_TEXT, positions, text_of
from kedge.importers.trl_rewards import EPSILON, SCALINGS, explanations
from kedge.trace.foreign import Conventions, Rows

FILE = r"completions_(\d+)\.parquet"
FIELDS = ("step", "prompt", "completion", "advantage")
NOT_REWARDS = {*FIELDS, "image", "images"}

REWARDS = Question(
    key="rewards",
    text="Which columns are reward functions? (names, with commas)",
    why="columns that log_extra wrote look the same",
    kind="columns",
    default="all",
)
WEIGHTS = Question(
    key="weights",
    text="What are their reward_weights? (numbers in the same order, with commas)",
    why="reward columns are raw; the advantage is that of their weighted sum",
    kind="columns",
    default="1",
)
SCALE = Question(
    key="scale_rewards",
    text="What was scale_rewards?",
    why="what the logged advantage is compared with; a difference is shown as a part of its own",
    choices={**{name: scaling.meaning for name, scaling in SCALINGS.items()}, **UNKNOWN},
    default="unknown",
)
BETA = Question(
    key="beta",
    text="What was beta? (GRPO's default is 0)",
    why="the files hold no KL; with beta 0 there was none, otherwise it is in the loss",
    kind="number",
    default="unknown",
)
CORRECTED = Question(
    key="use_bias_correction_kl",
    text="What was use_bias_correction_kl?",
    why="k3 times the importance ratio has the gradient of the KL, k3 alone has another",
    choices={
        "true": "k3 times the ratio (the default of trl 1.16)",
        "false": "k3 (versions without the setting do nothing else)",
        **UNKNOWN,
    },
    default="unknown",
    unless=("beta", ("0", "0.0", "unknown")),
)
ESTIMATORS = {"true": "k3+", "false": "k3", "unknown": "unknown"}


@dataclass(frozen=True)
class Table:
    """The rows of one file, as TRL wrote them."""

    step: int
    rows: list[tuple[str, Mapping[str, Any]]]  # file:row and the record

    def repeats(self, before: Table | None) -> int:
        """How many of the first rows are the last of the file before, as a queue keeps them.

        Only whole prompts count, since a generation batch holds whole groups.
        """
        if before is None:
            return 0
        old, new = ([_key(record) for _, record in table.rows] for table in (before, self))
        for size in range(min(len(old), len(new)), 0, -1):
            if new[0] == old[-size] and new[:size] == old[-size:] and self._whole(size):
                return size
        return 0

    def _whole(self, size: int) -> bool:
        """True where a group ends after the first `size` rows."""
        return size == len(self.rows) or _prompt(self.rows[size - 1][1]) != _prompt(self.rows[size][1])


def recognises(path: Path) -> bool:
    """True for a completions file, their folder, or an output_dir with that folder in it."""
    found = _files(path)
    record = first_record(found[0][1]) if found else None
    return record is not None and set(FIELDS) <= set(record)


def told(path: Path) -> Answers:
    """Reward columns and scaling, where only one choice of them gives the logged advantages of the first files."""
    left: set[tuple[str, str]] | None = None
    for _, file in _files(path)[:3]:
        try:
            rows = [record for _, record in records(file, FIELDS)]
        except InputError:
            return {}  # read says what is wrong
        scores = {name: np.array([_number(record[name]) for record in rows]) for name in _numeric(rows)}
        advantage = np.array([_number(record["advantage"]) for record in rows])
        found = explanations(scores, advantage, groups([_prompt(record) for record in rows]))
        left = found if left is None else left if found is None else left & found
    if not left:
        return {}
    answers: dict[str, str] = {}
    columns, scalings = ({pair[place] for pair in left} for place in (0, 1))
    if len(columns) == 1:
        answers |= {"rewards": columns.pop(), "weights": "1"}
    if len(scalings) == 1:
        answers["scale_rewards"] = scalings.pop()
    return answers


def conventions(path: Path, answers: Answers) -> Conventions:  # noqa: ARG001 (the shape of Format)
    """GRPO has its KL in the loss and one advantage for all tokens of a response."""
    beta = number(answers, "beta")
    scaling = SCALINGS.get(answers["scale_rewards"])
    kl = "unknown" if np.isnan(beta) else "loss" if beta else "none"
    return Conventions(
        trainer="TRL GRPO",
        kl=kl,
        kl_estimator=ESTIMATORS[answers["use_bias_correction_kl"]] if kl == "loss" else "unknown",
        kl_unit="per token",
        beta=beta,
        score_position="last",
        normalisation=scaling.normalisation if scaling else "unknown",
        epsilon=EPSILON if scaling and scaling.divides else 0.0,
        critic=False,
    )


def read(path: Path, answers: Answers, intake: Intake) -> Iterator[Rows]:
    """One step per file, in order of the steps in their names."""
    found = _files(path)
    if not found:
        raise InputError(Problem(str(path), "holds no completions_*.parquet", f"give {FORMAT.expected}"))
    evaluations = _evaluated(found[0][1])
    before: Table | None = None
    seen: set[tuple[str, ...]] = set()
    again: list[int] = []
    for file in intake.files([one for _, one in found]):
        table = _table(file)
        intake.rows += len(table.rows)
        if table.step in evaluations:
            reason = "rows of an evaluation: its log wrote over the training's file of the same step"
            for where, _ in table.rows:
                intake.leave_out(where, reason)
        else:
            repeated = table.repeats(before)
            for where, _ in table.rows[:repeated]:
                intake.leave_out(where, "repeated from the file before: no new generation since then")
            if repeated < len(table.rows) and _asked_before(table, seen):
                again.append(table.step)
            rows = _rows(table, table.rows[repeated:], answers, intake)
            if rows is not None:
                yield rows
        before = table
    _note(again, [step for step, _ in found], intake)


def _files(path: Path) -> list[tuple[int, Path]]:
    return numbered(path, FILE) or numbered(path / "completions", FILE)


def _table(file: Path) -> Table:
    match = re.fullmatch(FILE, file.name)
    named = int(match[1]) if match else -1
    rows = list(records(file, FIELDS))
    for where, record in rows:
        if str(record["step"]) != str(named):
            what = f"its step is {record['step']!r}, the file's name says {named}"
            raise InputError(Problem(where, what, "a file was renamed, or two put together; take it from a copy"))
    return Table(named, rows)


def _rows(table: Table, kept: Sequence[tuple[str, Mapping[str, Any]]], answers: Answers, intake: Intake) -> Rows | None:
    chosen: list[Mapping[str, Any]] = []
    texts: list[tuple[str, str]] = []
    for where, record in kept:
        prompt = text_of(record["prompt"])
        response = text_of(record["completion"], ("assistant",))
        if prompt is None or response is None:
            intake.leave_out(where, NO_TEXT)
        elif not finite(record["advantage"]):
            intake.leave_out(where, "the advantage is not a finite number")
        else:
            chosen.append(record)
            texts.append((prompt, response))
    if not chosen:
        return None
    names = _reward_columns(chosen, answers, table)
    scores = {name: np.array([_number(record[name]) for record in chosen]) for name in names}
    prompts, responses = map(list, zip(*texts, strict=True))
    mask, ids = positions(responses, intake)
    beta = number(answers, "beta")
    return Rows(
        step=table.step,
        response_mask=mask,
        scores=scores,
        weights=dict(zip(names, _weights(answers["weights"], len(names)), strict=True)),
        group=groups(prompts),
        prompts=prompts,
        responses=responses,
        response_ids=ids,
        advantage=np.array([record["advantage"] for record in chosen], float),
        beta=None if np.isnan(beta) else beta,
    )


def _reward_columns(rows: Sequence[Mapping[str, Any]], answers: Answers, table: Table) -> list[str]:
    numeric = _numeric(rows)
    if answers["rewards"] == "all":
        names = numeric
    else:
        names = [name.strip() for name in answers["rewards"].split(",")]
    missing = [name for name in names if name not in rows[0]]
    if missing or not names:
        what = f"has no reward column {missing[0]!r}" if missing else "has no column of numbers besides the advantage"
        remedy = f"name them with --answer rewards=...; columns of numbers: {', '.join(numeric) or 'none'}"
        raise InputError(Problem(table.rows[0][0], what, remedy))
    if unscored := [name for name in names if name not in numeric]:
        raise InputError(Problem(table.rows[0][0], f"column {unscored[0]!r} holds no numbers", "leave it out"))
    return names


def _numeric(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns that hold numbers (or nothing: a reward function may not apply), besides TRL's own."""

    def fits(value: Any) -> bool:
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool))

    return (
        [name for name in rows[0] if name not in NOT_REWARDS and all(fits(row[name]) for row in rows)] if rows else []
    )


def _weights(given: str, count: int) -> list[float]:
    try:
        weights = [float(weight) for weight in given.split(",")]
    except ValueError:
        raise InputError(Problem("--answer weights", f"{given!r} is not numbers with commas", "as in 1,0.5")) from None
    weights = weights * count if len(weights) == 1 else weights
    if len(weights) != count:
        what = f"{len(weights)} weights for {count} reward columns"
        raise InputError(Problem("--answer weights", what, "give one for each, or one for all"))
    return weights


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _prompt(record: Mapping[str, Any]) -> str:
    return json.dumps(record["prompt"], sort_keys=True, default=str)


def _key(record: Mapping[str, Any]) -> str:
    """All of a row but the step, to compare rows of two files."""
    return json.dumps({name: value for name, value in record.items() if name != "step"}, sort_keys=True, default=str)


def _evaluated(file: Path) -> set[int]:
    """Steps at which an evaluation was logged, as the newest `checkpoint-*/trainer_state.json` of the run says."""
    states = [
        (int(match[1]), one / "trainer_state.json")
        for one in file.parent.parent.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", one.name))
    ]
    steps: set[int] = set()
    for _, state in sorted(states):
        try:
            history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
            steps |= {int(line["step"]) for line in history if any(str(name).startswith("eval_") for name in line)}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a help, not a need: without it, same prompts in the same order still show
    return steps


def _asked_before(table: Table, seen: set[tuple[str, ...]]) -> bool:
    """True where an earlier file has the same prompts in the same order: evaluations do, training shuffles."""
    prompts = tuple(_prompt(record) for _, record in table.rows)
    known = len(set(prompts)) > 1 and prompts in seen
    seen.add(prompts)
    return known


def _note(again: Sequence[int], steps: Sequence[int], intake: Intake) -> None:
    """Say what the files are taken to be."""
    if again:
        shown = ", ".join(map(str, again[:5])) + (" ..." if len(again) > 5 else "")
        intake.note(
            f"{len(again)} files ask the prompts of an earlier one in the same order (steps {shown}): the log of an "
            "evaluation may have written over the training's; if so, remove them, or give the output_dir with its "
            "checkpoint-*/trainer_state.json, which tells"
        )
    between = np.diff(np.array(steps))
    if len(between) and between.min() > 1:
        intake.note(
            f"files come every {int(np.median(between))} steps (logging_steps): rows of the steps between were never "
            "written"
        )
    intake.note("special tokens were left out when TRL decoded: EOS, and whether a completion ended, are not known")


FORMAT = Format(
    name="trl-grpo",
    title="TRL GRPO completions",
    recognises=recognises,
    expected="output_dir/completions/completions_*.parquet with step, prompt, completion, advantage and rewards",
    asks=(REWARDS, WEIGHTS, SCALE, BETA, CORRECTED),
    read=read,
    conventions=conventions,
    fields=FIELDS,
    told=told,
    text_only=lambda _: True,
)
