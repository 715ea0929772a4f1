"""A policy loop followed to its end: progress, records, evaluations, checkpoints, and the finished model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from kedge.models.load import save_model
from kedge.models.lora import merged
from kedge.pipeline.context import Context
from kedge.pipeline.watch import Amend, Watch, look
from kedge.trace.writer import TraceWriter
from kedge.train import checkpoint
from kedge.train.checkpoint import State
from kedge.train.update import Learner

SHOWN = {"score": "score/mean", "kl": "kl/reference_per_sequence", "length": "length/mean", "loss": "direct/loss"}


class Stepped(Protocol):
    """What every policy loop yields."""

    @property
    def number(self) -> int: ...
    @property
    def state(self) -> State: ...


S = TypeVar("S", bound=Stepped)


def begin(context: Context, learner: Learner, fresh: State) -> State:
    """The state to go on from: the newest checkpoint's, with the learner put into it, or `fresh`."""
    found, state = checkpoint.latest(context.run.checkpoints), fresh
    if found is not None:
        state = checkpoint.load(found, learner)
        context.event("policy", state.step, "resumed", f"policy: going on from step {state.step}")
    # Without a checkpoint the evaluation before the first step is made again, too.
    context.run.truncate(-1 if found is None else state.step)
    return state


def follow(
    context: Context,
    learner: Learner,
    watch: Watch,
    state: State,
    steps: Iterator[S],
    record: Callable[[TraceWriter, S], dict[str, float]],
    *,
    amend: Amend | None = None,
) -> None:
    """Go through `steps`, keep what `record` makes of each, and write `models/policy`; `amend` is for the last look."""
    recipe = context.recipe
    total = context.steps

    def see(writer: TraceWriter, state: State) -> None:
        at, beta = state.step, state.controller.mean_beta
        look(context, learner.policy, watch, writer, at, beta, last=total, amend=amend if at == total else None)

    with (
        TraceWriter(context.run, text=recipe.trace.text, keep=recipe.trace.keep) as writer,
        context.progress.stage("policy", total, start=state.step) as stage,
    ):
        if state.step == 0:
            see(writer, state)
        for step in steps:
            figures = record(writer, step)
            context.metric("policy", step.number, figures)
            stage.advance(step.number, **{name: figures[key] for name, key in SHOWN.items() if key in figures})
            see(writer, step.state)
            stopping = context.interrupt.requested
            if stopping or step.state.step % recipe.checkpoint.every == 0 or step.state.step == total:
                writer.flush()  # what a checkpoint says is done must be on disk
                place = context.run.checkpoint(step.state.step)
                checkpoint.save(place, learner, step.state, keep=recipe.checkpoint.keep)
            if step.state.step == total:
                break
            context.interrupt.check(f"policy step {step.state.step}")
    save_model(merged(learner.policy), context.tokenizer, context.run.models / "policy")
