"""What a replay found, for Python, for JSON and for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kedge.diagnose.ledger import STYLES
from kedge.diagnose.margin import Margin
from kedge.experiment.replay.effects import ALL, Covariance, Effect, Flips
from kedge.experiment.replay.validity import Statement
from kedge.trace.reader import Part


@dataclass(frozen=True)
class Replay:
    """What changes would have done to the push of every logged step. Pairs are (logged, changed)."""

    run: str
    changes: tuple[str, ...]
    steps: tuple[int, ...]
    responses: int
    beta: tuple[float, float]  # mean over responses, reward per nat
    effects: Mapping[str, Effect]  # by feature
    flips: Mapping[str, Flips]  # by style
    push_mean: Mapping[str, tuple[float, float]]  # by style: mean over responses of the sum of token weights
    parts: Mapping[Part, tuple[float, float]]  # of Cov(advantage, length), advantage x tokens per response
    margin: tuple[Margin | None, Margin | None]  # matched net margin of the last probes
    effective: tuple[float, float]  # share of responses behind the push
    active: tuple[float, float]  # share of tokens that the clip lets through in the last epoch
    validity: tuple[Statement, ...]

    @property
    def shares(self) -> dict[Part, tuple[float, float]]:
        """Of the covariance of advantage and length, by part; each of the two columns sums to 1."""
        before, after = (sum(both[side] for both in self.parts.values()) for side in (0, 1))
        return {
            part: (both[0] / before if before else math.nan, both[1] / after if after else math.nan)
            for part, both in self.parts.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "run": self.run,
            "changes": list(self.changes),
            "steps": list(self.steps),
            "responses": self.responses,
            "beta": _pair(self.beta),
            "effects": {name: _effect(effect) for name, effect in self.effects.items()},
            "flips": {name: asdict(flips) | {"share": flips.share} for name, flips in self.flips.items()},
            "push_mean": {name: _pair(both) for name, both in self.push_mean.items()},
            "length_covariance": {str(part): _pair(both) for part, both in self.parts.items()},
            "length_shares": {str(part): _pair(both) for part, both in self.shares.items()},
            "margin": _pair((_margin_dict(self.margin[0]), _margin_dict(self.margin[1]))),
            "effective": _pair(self.effective),
            "active": _pair(self.active),
            "validity": [asdict(statement) for statement in self.validity],
        }

    def lines(self) -> list[str]:
        """For people."""
        return list(_lines(self))


def _lines(replay: Replay) -> Iterator[str]:
    first, last = (replay.steps[0], replay.steps[-1]) if replay.steps else (0, 0)
    yield f"replay of {replay.run}, steps {first} to {last}, {replay.responses} responses"
    yield f"changed: {', '.join(replay.changes) or 'nothing'}"
    yield ""
    if "length" in replay.effects:
        yield from _length(replay.effects["length"])
    yield ""
    yield "push on features (covariance with the feature, 95% interval; logged -> changed)"
    for effect in replay.effects.values():
        logged, changed = effect.decided
        if logged == changed == Covariance(0.0, 0.0, 0.0):
            continue  # a feature that no response has
        yield (
            f"  {effect.feature:<12} {_interval(logged)} -> {_interval(changed)} {_unit(effect)}: {effect.change}, "
            f"{effect.against} than logged"
        )
    yield ""
    yield "responses whose push changes sign"
    for style in (*STYLES, ALL):
        flips = replay.flips.get(style)
        if flips is None or not flips.responses:
            continue
        before, after = replay.push_mean[style]
        yield (
            f"  {style:<12} {flips.share:6.1%} of {flips.responses}: {flips.up_to_down} from up to down, "
            f"{flips.down_to_up} from down to up; mean push {before:+.3g} -> {after:+.3g}"
        )
    yield ""
    yield "covariance of advantage and length, by part (advantage x tokens per response; share of the logged one)"
    for part, (before, after) in replay.parts.items():
        if before or after:
            yield f"  {part!s:<20} {before:+8.3g} -> {after:+8.3g}  ({replay.shares[part][0]:+.2f})"
    yield f"  {'together':<20} {_together(replay, 0):+8.3g} -> {_together(replay, 1):+8.3g}"
    yield from _margin(replay)
    yield ""
    yield (
        f"behind the push stand effectively {replay.effective[0]:.0%} -> {replay.effective[1]:.0%} of the responses; "
        f"the clip lets {replay.active[0]:.1%} -> {replay.active[1]:.1%} of tokens through"
    )
    for statement in replay.validity:
        yield f"  {statement.kind}: {statement.text}"


def _length(effect: Effect) -> Iterator[str]:
    words = {
        "rises": "under the change length is predicted to rise",
        "falls": "under the change length is predicted to fall",
        "unclear": "under the change it is not clear which way length goes (the interval holds 0)",
    }
    logged = effect.decided[0]
    times = f"{effect.ratio:.2f} times the logged push" if logged.value else "the logged push is 0"
    yield f"{words[effect.change]}; its push is {times}: {effect.against} than logged"
    yield (
        f"on the next step, at the pace of the last one: {effect.expected[0]:+.2f} -> {effect.expected[1]:+.2f} tokens "
        f"(the logged updates moved their own responses by {effect.moved:+.2f})"
    )
    basis = {"return": "what a response earns in all", "push": "the weights of its tokens, position by position"}
    yield f"from the covariance of length with {basis[effect.predictor]}"


def _together(replay: Replay, side: int) -> float:
    return sum(both[side] for both in replay.parts.values())


def _margin(replay: Replay) -> Iterator[str]:
    logged, changed = replay.margin
    if logged is None:
        return
    yield ""
    yield f"matched net margin, verbose against brief, after {logged.step} updates ({logged.prompts} prompts)"
    for name, one in (("logged", logged), ("changed", changed)):
        if one is not None:
            yield (
                f"  {name:<8} score {one.score:+.3f} - KL {one.kl_cost:.3f} - length {one.length_cost:+.3f} = "
                f"{one.net:+.3f} [{one.low:+.3f}, {one.high:+.3f}], above 0 on {one.share_positive:.0%}"
            )


def _interval(one: Covariance) -> str:
    return f"{one.value:+.3g} [{one.low:+.3g}, {one.high:+.3g}]"


def _unit(effect: Effect) -> str:
    return f"reward x {effect.unit}" if effect.predictor == "return" else effect.unit


def _pair(both: tuple[Any, Any]) -> dict[str, Any]:
    return {"logged": both[0], "changed": both[1]}


def _margin_dict(one: Margin | None) -> dict[str, Any] | None:
    return None if one is None else asdict(one)


def _effect(effect: Effect) -> dict[str, Any]:
    return {
        "unit": effect.unit,
        "predictor": effect.predictor,
        "change": effect.change,
        "against_logged": effect.against,
        "ratio": effect.ratio,
        "return": _pair((asdict(effect.returns[0]), asdict(effect.returns[1]))),
        "push": _pair((asdict(effect.pushes[0]), asdict(effect.pushes[1]))),
        "difference": asdict(effect.difference),
        "expected_change": _pair(effect.expected),
        "moved": effect.moved,
    }
