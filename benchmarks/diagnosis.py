"""How well the diagnosis names the faults of runs that really have them, and how often it speaks of healthy ones.

Base runs of the built-in desk in which score and gold rise together; forks of them at a step in the middle, with one
fault each in two severities, with benign changes, and with other draws alone. From the repository root:

    python benchmarks/diagnosis.py make --seeds 0 1 2 --workers 2
    python benchmarks/diagnosis.py views
    python benchmarks/diagnosis.py score

`make` trains and is resumable; `views` reads the traces of runs that have no view yet, or all of them with --again;
`score` writes docs/results/diagnosis.json and .md from the views. With --print it writes nothing and says, run by run,
what is found. `fixtures` keeps the views named by --seeds, --only and --severity for the tests.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from desk_runs import RESULTS, side_by_side
from faults.faults import TEST_SEEDS, TUNING_SEEDS
from faults.page import lines_of, render
from faults.runs import Case, cases, make
from faults.score import score
from faults.views import beside, write_fixtures, write_views

OUT = Path("runs/diagnosis")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("make", "views", "score", "fixtures"):
        command = commands.add_parser(name)
        command.add_argument("--seeds", type=int, nargs="+", default=[*TUNING_SEEDS, *TEST_SEEDS])
        command.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of faults and benign changes")
        command.add_argument("--severity", choices=("strong", "mild"), help="of faults; benign changes are left out")
        command.add_argument("--workers", type=int, default=1)
        command.add_argument("--again", action="store_true", help="views: also where there is one")
        command.add_argument("--print", action="store_true", help="score: say what is found in each run, write nothing")
    given = parser.parse_args()
    wanted = [
        case
        for case in cases(given.seeds, given.out)
        if (not given.only or case.name in given.only) and (given.severity in (None, case.severity))
    ]
    if given.command == "make":
        make(wanted, given.workers)
    elif given.command == "views":
        write_views(wanted, given.workers, again=given.again)
    elif given.command == "fixtures":
        write_fixtures(wanted)
    else:
        _score(wanted, given.workers, say=given.print)


def _score(wanted: Sequence[Case], workers: int, *, say: bool) -> None:
    there = [case for case in wanted if beside(case).exists()]
    rows = [score(case) for case in there] if workers == 1 else side_by_side(score, there, workers)
    if say:
        print("\n".join(lines_of(rows)))
        return
    text = json.dumps(rows, indent=None, separators=(",", ":")).replace('{"name"', '\n{"name"')
    (RESULTS / "diagnosis.json").write_text(text + "\n", encoding="utf-8")
    (RESULTS / "diagnosis.md").write_text(render(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
