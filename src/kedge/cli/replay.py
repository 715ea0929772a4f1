"""`kedge replay`: what other settings would have done to the push of logged rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kedge.cli.output import Json, execute
from kedge.errors import InputError, Problem
from kedge.progress import Interrupt, Progress


def replay(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change one key, such as policy.kl.beta=0.2, or score=residual_length; repeatable.",
        ),
    ] = None,
    reward: Annotated[
        Path | None,
        typer.Option(
            "--reward", metavar="FOLDER", help="Score the responses with this reward model.", show_default=False
        ),
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option("--feature", metavar="WHAT", help="Also this feature: regex:PATTERN or file.py:name; repeatable."),
    ] = None,
    first: Annotated[int | None, typer.Option("--from", min=0, help="First policy step.", show_default=False)] = None,
    last: Annotated[int | None, typer.Option("--to", min=0, help="Last policy step.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Advantages and update weights of the logged responses under changed settings, without training."""

    def work(_progress: Progress, _interrupt: Interrupt) -> dict[str, Any]:
        from kedge.diagnose.features import FEATURES, feature_named
        from kedge.trace.reader import read_run

        if first is not None and last is not None and first > last:
            raise InputError(Problem(f"--from {first}", f"comes after --to {last}", "give the earlier step first"))
        run = read_run(folder)
        own = [feature_named(name) for name in features or ()]
        if reward is not None and not reward.is_dir():
            raise InputError(Problem(f"--reward {reward}", "there is no such folder", "give a reward model's folder"))
        from kedge.experiment.replay import replayed

        found = replayed(
            run,
            changes or (),
            reward=reward,
            features={**FEATURES, **{one.name: one for one in own}},
            first=first,
            last=last,
        )
        return found.to_dict() | {"lines": found.lines()}

    execute(work, as_json=as_json)
