"""The command line: parse, call, print. Nothing heavy is imported before a command needs it.

Results go to stdout, everything else to stderr. Exit codes are those of `kedge.errors`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.core import TyperGroup

from kedge import __version__
from kedge.cli import data, evaluate, runs, study
from kedge.cli.audit import audit
from kedge.cli.compare import compare
from kedge.cli.diagnose import checks, diagnose
from kedge.cli.errors import explained
from kedge.cli.forecast import forecast
from kedge.cli.import_ import import_
from kedge.cli.label import join
from kedge.cli.label_site import register
from kedge.cli.ledger import ledger
from kedge.cli.replay import replay
from kedge.cli.rescore import rescore
from kedge.cli.trace import redact
from kedge.cli.trial import trial
from kedge.cli.verify import verify
from kedge.errors import Problem

HELP = {"help_option_names": ["-h", "--help"]}


class RecipeFirst(TyperGroup):
    """A group whose first command is meant where no command is named: `kedge reward RECIPE`."""

    def resolve_command(self, ctx, args):  # type: ignore[no-untyped-def]
        if args[0] not in self.commands:
            args = ["train", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx, args):  # type: ignore[no-untyped-def]
        """Options in front of the recipe belong to the command, too."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["train", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=HELP)
for command in (
    runs.demo,
    runs.run,
    runs.sft,
    runs.policy,
    runs.report,
    diagnose,
    checks,
    ledger,
    forecast,
    trial,
    replay,
    rescore,
    compare,
    verify,
):
    app.command()(command)
app.command("import")(import_)

reward = typer.Typer(cls=RecipeFirst, context_settings=HELP, help="Train a reward model, or measure one.")
reward.command("train")(runs.reward)
reward.command("evaluate")(evaluate.evaluate)
app.add_typer(reward, name="reward")

judged = typer.Typer(no_args_is_help=True, context_settings=HELP, help="Check, convert and audit what people judged.")
judged.command()(data.check)
judged.command()(data.convert)
judged.command()(audit)
app.add_typer(judged, name="data")

labels = typer.Typer(
    no_args_is_help=True, context_settings=HELP, help="Collect what people say of responses, or join it to a run."
)
labels.command()(join)
register(labels, HELP)
app.add_typer(labels, name="label")

traces = typer.Typer(no_args_is_help=True, context_settings=HELP, help="What a run keeps of the words in it.")
traces.command()(redact)
app.add_typer(traces, name="trace")

studies = typer.Typer(no_args_is_help=True, context_settings=HELP, help="Carry out many runs and compare them.")
studies.command()(study.overoptimisation)
app.add_typer(studies, name="study")


@app.callback(invoke_without_command=True)
def kedge(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Reinforcement learning from human feedback that shows what moved the policy."""
    if version:
        typer.echo(f"kedge {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: that of the process) and return its exit code; raises nothing."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    problems: Sequence[Problem]
    try:
        status = app(args=arguments, prog_name="kedge", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except BrokenPipeError:
        # Whoever read our output has stopped, as in `kedge --help | head`; nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        problems, code = explained(error, arguments)
        if os.environ.get("KEDGE_DEBUG"):
            traceback.print_exc()
    for problem in problems:
        typer.echo(f"error: {problem}", err=True)
    if "--json" in arguments:
        typer.echo(json.dumps({"error": [vars(problem) for problem in problems], "exit_code": code}))
    return code
