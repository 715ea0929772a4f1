"""`kedge reward evaluate`: how good a judge is, and what a policy would make of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kedge.cli.output import Json, execute
from kedge.errors import InputError, Problem
from kedge.progress import Interrupt, Progress

if TYPE_CHECKING:
    from kedge.data.records import Judgment, Loaded
    from kedge.evaluate.reward.answers import Judged, RewardJudge


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A reward model's folder; or `length` (longer wins), or `linear` (words, learnt from DATA itself).",
            show_default=False,
        ),
    ],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="What people judged, any kind.", show_default=False)],
    grid: Annotated[
        Path | None,
        typer.Option(
            "--grid", metavar="FILE", help="Right and wrong answers in three styles each.", show_default=False
        ),
    ] = None,
    padding: Annotated[
        Path | None,
        typer.Option("--padding", metavar="FILE", help="Sentences that say nothing, one a line.", show_default=False),
    ] = None,
    holdout: Annotated[
        float, typer.Option("--holdout", min=0, max=1, help="Only this share of prompts: those a recipe held out.")
    ] = 1.0,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="OUT", help="Also write a page.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a reward model: agreement with people, length, calibration, padding, style."""

    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:  # noqa: ARG001 (the shape execute wants)
        check_page(html)
        from kedge.evaluate.reward.answers import judged
        from kedge.evaluate.reward.grid import load_grid
        from kedge.evaluate.reward.measure import measure
        from kedge.evaluate.reward.padding import NEUTRAL, sentences_of
        from kedge.report.reward_text import lines

        sentences = NEUTRAL if padding is None else sentences_of(padding)
        rows = None if grid is None else load_grid(grid)
        loaded = _held_out(data, holdout)
        table = judged(loaded.rows)
        found = measure(_judge(model, table, progress), table, sentences=sentences, grid=rows)
        result = {"data": str(data), "holdout": holdout, "rows": len(loaded.rows)}
        result |= {"rejected": len(loaded.rejected)} | found.figures()
        shown = lines(found)
        if loaded.rejected:
            shown.insert(0, f"{len(loaded.rejected)} of {loaded.total} rows left out: kedge data check {data}")
        if html is not None:
            from kedge.report.reward_page import write_reward_page

            result["report"] = str(write_reward_page(found, data.name, html))
        return result | {"lines": shown}

    execute(work, as_json=as_json)


def check_page(out: Path | None) -> None:
    """Before the work, so that it is not done in vain."""
    if out is None:
        return
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(Problem(f"--html {out}", "is not the name of an HTML file", "end it in .html"))
    if not out.parent.is_dir():
        raise InputError(Problem(f"--html {out}", "its folder is not there", "make the folder or choose another"))


def _held_out(path: Path, share: float) -> Loaded[Judgment]:
    """The judgments on held-out prompts; malformed rows are left out and counted."""
    from kedge.data.records import Loaded
    from kedge.data.split import is_held_out
    from kedge.data.validate import load_judgments

    loaded = load_judgments(path, max_rejected=1.0)
    kept = loaded.where(lambda row: is_held_out(row.prompt, share))
    if not kept.rows:
        what = f"none of its {len(loaded.rows)} rows is on a held-out prompt"
        raise InputError(Problem(f"--holdout {share:g}", what, "give a larger share, or more data"))
    return Loaded(kept.rows, kept.lines, loaded.rejected, loaded.total)


def _judge(name: str, table: Judged, progress: Progress) -> RewardJudge:
    if name == "length" and not Path(name).is_dir():
        from kedge.evaluate.reward.answers import LENGTH

        return LENGTH
    if name == "linear" and not Path(name).is_dir():
        from kedge.evaluate.reward.linear import FOLDS, cross_fitted

        with progress.stage("fitting", FOLDS) as stage:
            return cross_fitted(table, on_fold=stage.advance)
    from kedge.evaluate.reward.folder import folder_judge

    return folder_judge(Path(name), progress)
