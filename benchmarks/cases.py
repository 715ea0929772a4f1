"""Cases: runs of the built-in desk that went wrong in a known way, what Kedge says of them, and its two changes tried.

Each case is one recipe under three seeds. Every run is diagnosed, the two changes that the diagnosis proposes are tried
on short forks beside null forks (`kedge trial`), and the page says what came of it, good or bad.
Writes docs/cases/*.md and cases.json. From the repository root:

    python benchmarks/cases.py --out runs/cases --workers 2
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from desk_runs import DESK, ROOT, carry_out, lines, side_by_side
from policy_runs import spread, table

COMMAND = "python benchmarks/cases.py"
PAGES = ROOT / "docs" / "cases"
SEEDS = (0, 1, 2)
BRANCHES = 2  # forks per arm and seed
FORK_STEPS = 10
KEPT = ("checkpoint.every=4", "checkpoint.keep=99", "trace.probes_every=4", "evaluate.every=4", "threads=1")
FIGURES = ("score", "length", "kl", "net_margin", "gold")

Settings = tuple[str, ...]
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A run that goes wrong: whom the reward model learnt from, the policy's settings, and the question it answers."""

    name: str
    title: str
    question: str
    settings: Settings
    biased: bool = True  # the reward model learnt from annotators who like long answers
    step: int = 12  # from which the changes are tried
    own: tuple[Settings, ...] = ()  # changes of our own, where the diagnosis proposes none
    limits: tuple[float, float] | None = None  # nats per response, and length over the reference's


CASES: tuple[Case, ...] = (
    Case(
        "verbose-drift",
        "Answers grow verbose though the KL penalty is large",
        "The score climbs, answers turn long, the KL penalty on them is large and their advantages are still positive. "
        "Why?",
        ("policy.kl.beta=0.1", "policy.lr=3e-4", "policy.lam=1.0"),
    ),
    Case(
        "three-signals",
        "Score up, quality down, KL up",
        "Three signals disagree: the score rises, people like the answers less, KL rises. Which one is right?",
        ("policy.kl.beta=0.03", "policy.lr=3e-4", "policy.lam=1.0"),
        biased=False,
    ),
    Case(
        "spike",
        "A score that jumps at constant length",
        "The score shoots up within a few steps and answers are not longer. What has the policy found?",
        ("policy.kl.beta=0.02", "policy.lr=1e-3", "policy.lam=1.0"),
        biased=False,
    ),
    Case(
        "no-penalty",
        "Beta absent",
        "What does a run without any KL penalty look like from inside?",
        ("policy.kl.beta=0.0", "policy.lr=5e-4", "policy.lam=1.0"),
    ),
    Case(
        "held-too-tight",
        "Beta too large",
        "The policy hardly moves. Is it the penalty, the learning rate or the reward?",
        ("policy.kl.beta=3.0", "policy.lr=3e-4", "policy.lam=1.0"),
        biased=False,
        own=(("policy.kl.beta=0.3",), ("policy.lr=1e-3",)),
    ),
    Case(
        "unscaled",
        "A reward in the wrong unit",
        "Rewards come in a unit twenty times too large and nothing scales advantages. What gives it away?",
        ("policy.kl.beta=0.3", "policy.lr=3e-4", "policy.lam=1.0", "policy.whiten=false", "rewards.level.kind=regex",
         "rewards.level.pattern=you can", "rewards.level.weight=20"),
        biased=False,
    ),
    Case(
        "wrong-unit",
        "A KL controller in the wrong unit",
        "The target was copied from a trainer that counts otherwise: 40 nats. Beta only ever falls.",
        ("policy.kl.mode=adaptive", "policy.kl.beta=0.3", "policy.kl.target=40", "policy.kl.horizon=400",
         "policy.lr=3e-4", "policy.lam=1.0"),
    ),
    Case(
        "two-constraints",
        "An objective under two constraints",
        "At most 2 nats and at most 1.2 times the reference's length: which of two changes keeps both, and what "
        "does it cost in score?",
        ("policy.kl.beta=0.2", "policy.lr=3e-4", "policy.lam=1.0"),
        limits=(2.0, 1.2),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    case: Case
    seed: int
    out: Path

    def __str__(self) -> str:
        return f"{self.case.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.out / self.case.name / f"seed-{self.seed}"

    @property
    def start(self) -> Path:
        return self.out / f"start-{'biased' if self.case.biased else 'plain'}-{self.seed}"

    @property
    def world(self) -> Settings:
        return (f"seed={self.seed}", *(() if self.case.biased else ("desk.annotators.length=0",)))


def begin(job: Job) -> None:
    """The supervised policy and the reward model of a seed and kind of annotators."""
    carry_out("sft", DESK, job.start, job.world)
    carry_out("reward", DESK, job.start, job.world)


def carried_out(job: Job) -> Row:
    """One run, its diagnosis, and its two changes tried."""
    from kedge.diagnose.diagnosis import diagnose, read_view
    from kedge.diagnose.prose import prose
    from kedge.diagnose.trials import read_trials
    from kedge.experiment import trial as trials
    from kedge.progress import Interrupt, Progress

    carry_out("policy", DESK, job.folder, (*job.world, *KEPT, *job.case.settings), start=job.start)
    view, _ = read_view(job.folder)
    found = diagnose(view)
    changes = _triable(job, [change.overrides for change in prose(view, found).changes] or job.case.own)
    tried: Row = {"arms": []}
    if changes:
        planned = trials.plan(job.folder, job.case.step, steps=FORK_STEPS, seeds=BRANCHES, arms=changes)
        place = job.folder / "trials" / planned.name
        place.mkdir(parents=True, exist_ok=True)
        quiet, interrupt = Progress(quiet=True), Interrupt()
        tried = trials.trial(planned, place, workers=1, resume=True, progress=quiet, interrupt=interrupt)
    said = prose(view, found, read_trials(job.folder))
    return {
        "case": job.case.name,
        "seed": job.seed,
        **_ends(job.folder),
        "findings": [
            {"check": one.check, "status": one.status, "strength": one.strength, "onset": one.onset,
             "summary": one.summary}
            for one in found.findings if one.status in ("fail", "warn")
        ],
        "likely": list(found.likely),
        "causes": [{"sentences": list(one.sentences), "refuted_by": one.refuted_by} for one in said.causes],
        "penalty": list(said.penalty),
        "proposed": [
            {"settings": one.settings, "said": [one.effect, one.reward, one.gradient], "cost": one.cost}
            for one in said.changes if one.effect
        ],
        "arms": [{"changes": list(arm["changes"]), "rows": arm["rows"]} for arm in tried["arms"]],
    }  # fmt: skip


def _triable(job: Job, changes: Sequence[Settings]) -> list[Settings]:
    """Those of the changes that a fork of the run can follow."""
    from kedge.errors import InputError
    from kedge.experiment import trial as trials

    found = []
    for change in changes:
        try:
            trials.plan(job.folder, job.case.step, steps=FORK_STEPS, seeds=BRANCHES, arms=[change])
        except InputError:
            continue
        found.append(change)
    return found


def _ends(folder: Path) -> Row:
    """The start and the end of a run."""
    looks = [line for line in lines(folder / "metrics.jsonl") if line["stage"] == "evaluation"]
    truth = lines(folder / "truth/evaluation.jsonl")
    names = {"score": "evaluation/score", "kl": "evaluation/kl_per_sequence", "length": "evaluation/length"}
    ends = {name: [looks[0][key], looks[-1][key]] for name, key in names.items()}
    return ends | {name: [truth[0][name], truth[-1][name]] for name in ("gold", "correct")}


def page(case: Case, rows: Sequence[Row]) -> str:
    """A case page; all its numbers come from `rows`."""
    settings = " ".join(case.settings)
    annotators = "annotators who like long answers" if case.biased else "annotators without a bias"
    text = [
        f"# {case.title}", "", f"*{case.question}*", "",
        f"Made by `{COMMAND}`, {len(rows)} seeds; raw figures in `cases.json`. The built-in desk, a reward model of",
        f"{annotators}, and `{settings}`; the rest is the demo's recipe.", "",
        "## What happened", "", *_happened(rows), "",
        "## What `kedge diagnose` says", "", *_said(rows), "",
        "## Why, in numbers", "", *_why(rows[0]), "",
        "## Two changes, tried", "", *_tried(case, rows), "",
    ]  # fmt: skip
    return "\n".join(text)


def _happened(rows: Sequence[Row]) -> list[str]:
    cells = []
    for name, unit in (("score", "standard deviations"), ("kl", "nats per response"), ("length", "tokens"),
                       ("gold", "what the world knows an answer is worth"), ("correct", "share")):  # fmt: skip
        ends = [[row[name][at] for row in rows] for at in (0, 1)]
        cells.append([name, *(spread(end) for end in ends), unit])
    return table(["figure", "start", "end", "unit"], cells)


def _said(rows: Sequence[Row]) -> list[str]:
    cells = []
    for row in rows:
        others = [f"{one['check']} ({one['status']})" for one in row["findings"] if one["check"] not in row["likely"]]
        onset = [str(one["onset"]) for one in row["findings"] if one["check"] in row["likely"] and one["onset"]]
        likely = ", ".join(row["likely"]) or "nothing"
        cells.append([str(row["seed"]), likely, ", ".join(onset) or "–", ", ".join(others) or "–"])
    return table(["seed", "most likely", "first alarm at step", "also"], cells)


def _why(row: Row) -> list[str]:
    """The diagnosis of the first seed, in its own words."""
    text = [f"Of seed {row['seed']}, as the report has it:", ""]
    for cause in row["causes"][:2]:
        text += [f"- {sentence}" for sentence in cause["sentences"]]
        text += [f"- It would be refuted if {cause['refuted_by']}."] if cause["refuted_by"] else []
    return [*text, *[f"- {sentence}" for sentence in row["penalty"]]]


def _tried(case: Case, rows: Sequence[Row]) -> list[str]:
    cells, sentences = [], []
    for row in rows:
        for arm in row["arms"]:
            found = {one["figure"]: one for one in arm["rows"]}
            shown = [f"{found[name]['difference']:+.2f}" if name in found else "–" for name in FIGURES]
            ends = [f"{found['kl']['changed']:.2f}", f"{_longer(found):.2f}"]
            cells.append([str(row["seed"]), f"`{' '.join(arm['changes'])}`", *shown, *ends])
    if not cells:
        return ["The diagnosis proposed no settings to try."]
    for one in rows[0]["proposed"]:
        told = " ".join(part if part.endswith(".") else f"{part}." for part in one["said"] if part)
        sentences += [f"- `{one['settings']}`: {told} It costs: {one['cost']}."]
    sentences += [
        "",
        f"From the checkpoint of step {{}}, {FORK_STEPS} steps, {BRANCHES} forks a seed beside as many null forks that",
        "draw the same; differences to the null forks at the end, gold in the world's own unit.",
    ]
    if not any(row["proposed"] for row in rows):
        sentences = ["The diagnosis proposed no settings to try; these are our own.", *sentences]
    heads = ["seed", "change", *FIGURES, "KL at the end", "length over the reference's"]
    return [*sentences, "", *table(heads, cells), *_kept(case, rows)]


def _longer(found: dict[str, Row]) -> float:
    return float(found["length"]["changed"] / found["length"]["reference"])


def _kept(case: Case, rows: Sequence[Row]) -> list[str]:
    """How often each change kept both limits of a case, and what it cost in score."""
    if case.limits is None:
        return []
    nats, longer = case.limits
    by_change: dict[str, list[tuple[bool, float]]] = {}
    for row in rows:
        for arm in row["arms"]:
            found = {one["figure"]: one for one in arm["rows"]}
            name = ", ".join(change.partition("=")[0] for change in arm["changes"])
            kept = found["kl"]["changed"] <= nats and _longer(found) <= longer
            by_change.setdefault(name, []).append((kept, found["score"]["difference"]))
    return [
        "",
        *(
            f"- `{name}` keeps both limits in {sum(kept for kept, _ in seen)} of {len(seen)} seeds; score "
            f"{statistics.fmean(score for _, score in seen):+.2f} against the null forks."
            for name, seen in by_change.items()
        ),
    ]


def index(rows: Sequence[Row]) -> str:
    """The list of the cases."""
    cells = []
    for case in CASES:
        mine = [row for row in rows if row["case"] == case.name]
        if mine:
            likely = sorted({name for row in mine for name in row["likely"]}) or ["nothing"]
            gold = statistics.fmean(row["gold"][1] - row["gold"][0] for row in mine)
            cells.append([f"[{case.title}]({case.name}.md)", ", ".join(likely), f"{gold:+.2f}"])
    text = [
        "# Cases",
        "",
        f"Runs that went wrong in a known way, made by `{COMMAND}`: what the diagnosis says of each,",
    ]
    text += ["and what its two changes did when tried. Gold is what the built-in world knows; no check reads it.", ""]
    return "\n".join([*text, *table(["case", "most likely, over seeds", "change in gold"], cells), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/cases"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="make only these cases again")
    given = parser.parse_args()
    PAGES.mkdir(parents=True, exist_ok=True)
    path = PAGES / "cases.json"
    chosen = [case for case in CASES if not given.only or case.name in given.only]
    jobs = [Job(case, seed, given.out) for case in chosen for seed in given.seeds]
    given.out.mkdir(parents=True, exist_ok=True)
    side_by_side(begin, list({job.start: job for job in jobs}.values()), given.workers)
    made = side_by_side(carried_out, jobs, given.workers)
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    remade = {(row["case"], row["seed"]) for row in made}
    rows = [row for row in kept if (row["case"], row["seed"]) not in remade] + made
    order = [case.name for case in CASES]
    rows = sorted(
        (row for row in rows if row["case"] in order), key=lambda row: (order.index(row["case"]), row["seed"])
    )
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for case in CASES:
        mine = [row for row in rows if row["case"] == case.name]
        if mine:
            (PAGES / f"{case.name}.md").write_text(page(case, mine).replace("{}", str(case.step)), encoding="utf-8")
    (PAGES / "index.md").write_text(index(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
