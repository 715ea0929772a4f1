"""A policy loop followed to its end: progress, records, evaluations, checkpoints, and the finished model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol, TypeVar

from kedge.errors import StoppedByGuard
from kedge.models.load import save_model
from kedge.models.lora import merged
from kedge.pipeline.context import Context
from kedge.pipeline.guard import LiveGuard, finish_return
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
    finish_return(context.run)
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
    enter: Callable[[State], Iterator[S]],
    record: Callable[[TraceWriter, S], dict[str, float]],
    *,
    amend: Amend | None = None,
    guard: LiveGuard | None = None,
) -> None:
    """Go through the steps that `enter(state)` yields, keep what `record` makes of each, and write `models/policy`.

    `amend` is for the last look. After each step `guard` may have the loop entered again from another state, or end it;
    then `StoppedByGuard` is raised, when everything is written.
    """
    recipe = context.recipe
    total = context.steps

    def see(writer: TraceWriter, state: State) -> None:
        at, beta = state.step, state.controller.mean_beta
        look(context, learner.policy, watch, writer, at, beta, last=total, amend=amend if at == total else None)

    def save(writer: TraceWriter, state: State) -> None:
        writer.flush()  # what a checkpoint says is done must be on disk
        going_on = guard is not None and state.step < total and not state.guard.stopped
        keep = guard.keep if guard is not None and going_on else recipe.checkpoint.keep
        checkpoint.save(context.run.checkpoint(state.step), learner, state, keep=keep)

    def stopped() -> bool:
        return guard is not None and bool(state.guard.stopped)

    with (
        TraceWriter(context.run, text=recipe.trace.text, keep=recipe.trace.keep) as writer,
        context.progress.stage("policy", total, start=state.step) as stage,
    ):
        if state.step == 0 and not context.run.checkpoint(0).exists():
            see(writer, state)
            if guard is not None and guard.keep > recipe.checkpoint.keep:
                save(writer, state)  # what there is to go back to before the first regular checkpoint
        entered = True
        while entered and not stopped():
            entered = False
            for step in enter(state):
                figures = record(writer, step)
                context.metric("policy", step.number, figures)
                stage.advance(step.number, **{name: figures[key] for name, key in SHOWN.items() if key in figures})
                state = replace(step.state, guard=state.guard)
                see(writer, state)
                if guard is not None:
                    writer.flush()
                    ruling = guard.look(state)
                    state, entered = ruling.state, ruling.enter_again
                    if ruling.returned:
                        state = begin(context, learner, state)
                        break
                ended = state.step == total or stopped()
                if ended or context.interrupt.requested or state.step % recipe.checkpoint.every == 0:
                    save(writer, state)
                if ended:
                    entered = False
                    break
                context.interrupt.check(f"policy step {state.step}")
                if entered:
                    break
    save_model(merged(learner.policy), context.tokenizer, context.run.models / "policy")
    if stopped():
        raise StoppedByGuard(f"policy step {state.step}", state.guard.stopped)
