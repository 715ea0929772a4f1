"""`kedge forecast`: where a reward model will push a policy, before a gradient is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kedge.cli.output import Json, execute
from kedge.errors import InputError, Problem
from kedge.progress import Interrupt, Progress


def forecast(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="A run: its supervised policy, reward model and prompts."),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option("--policy", metavar="DIR", help="The policy as it is now, a model folder.")
    ] = None,
    reward: Annotated[
        list[Path] | None, typer.Option("--reward", metavar="DIR", help="A reward model's folder; repeat to rank.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts, one a row; see docs/preferences.md.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=16, help="Answers per prompt.")] = 64,
    beta: Annotated[
        list[float] | None, typer.Option("--beta", help="A coefficient whose optimum to show; repeatable.")
    ] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option("--feature", help="One more feature: a pattern, or module:function; repeatable."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Token budget of an answer; the run's, else 48.")
    ] = None,
    max_prompts: Annotated[int, typer.Option("--max-prompts", min=1, help="Prompts to ask, evenly spaced.")] = 150,
    html: Annotated[Path | None, typer.Option("--html", metavar="OUT", help="Also write a page.")] = None,
    as_json: Json = False,
) -> None:
    """Where will this reward model push, and at which beta? From scored answers of the policy, without training."""

    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:
        from kedge.cli.evaluate import check_page

        check_page(html)
        if any(one <= 0 for one in beta or ()):
            raise InputError(Problem("--beta", "must be above 0", "give the reward that a nat costs, such as 0.1"))
        from kedge.experiment import forecasting

        request = forecasting.Request(samples, tuple(beta or ()), tuple(feature or ()), max_new_tokens, max_prompts)
        if run is not None:
            _refuse_both(policy, prompts)
            found = forecasting.of_run(run, reward or [], request, progress, interrupt)
        else:
            given = _all_given(policy, reward, prompts)
            found = forecasting.of_folders(*given, request, progress, interrupt)
        if html is not None:
            from kedge.report.forecast_page import write_forecast

            found["report"] = str(write_forecast(found, html))
        return found

    execute(work, as_json=as_json)


def _refuse_both(policy: Path | None, prompts: Path | None) -> None:
    if policy is not None or prompts is not None:
        what = "a run brings its own policy and prompts"
        raise InputError(Problem("kedge forecast", what, "give RUN, or --policy, --reward and --prompts"))


def _all_given(policy: Path | None, reward: list[Path] | None, prompts: Path | None) -> tuple[Path, list[Path], Path]:
    if policy is None or not reward or prompts is None:
        named = {"--policy": policy, "--reward": reward, "--prompts": prompts}
        missing = ", ".join(name for name, value in named.items() if not value)
        raise InputError(Problem("kedge forecast", f"needs {missing}", "give them, or the folder of a run"))
    return policy, reward, prompts
