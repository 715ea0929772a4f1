"""Why the KL penalty did not stop it, in log-probabilities: what an answer gained in score against what KL took."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kedge.diagnose.contrast import Contrast
from kedge.diagnose.margin import TERCILES, Margin, margin
from kedge.diagnose.steps import LATE
from kedge.diagnose.view import View

HARDLY = 200  # nats; no answer comes that far
CLOSE = 0.02  # of the cost: nearer, both ways of counting say the same


def penalty(view: View, contrast: Contrast) -> Iterator[str]:
    """Sentences on the pairs of a contrast at the last look, over the looks, and on the price of the last nats."""
    margins = contrast.margins
    if margins:
        if contrast.source:
            yield contrast.source
        yield from _matched(margins[-1], contrast)
        yield from _when_it_paid(margins)
    yield from _price(view)
    if not margins:
        yield (
            "The run keeps neither probe pairs nor evaluation samples, so what the same prompt's verbose and brief "
            "answer score, and how many nats apart they have moved, is not known."
        )


def _matched(last: Margin, contrast: Contrast) -> Iterator[str]:
    more, less = contrast.more, contrast.less
    yield (
        f"After {last.step} updates, on the same {last.prompts} prompts, {more} scores {last.score:+.2f} against "
        f"{less}."
    )
    if last.beta <= 0:
        yield "Beta is 0: a nat costs nothing, so there is no penalty that could have stopped anything."
        return
    moved = "more" if last.kl >= 0 else "less"
    other = "that of the brief one" if less == "the brief one" else less
    yield (
        f"The policy has raised the log-probability of {more} over the reference's by {abs(last.kl):.1f} nats {moved} "
        f"than {other}{_charged(last)}. At beta {last.beta:.3g} reward per nat that costs {last.kl_cost:.2f} reward"
        f"{_length_cost(last)}, so {last.net:+.2f} is left (95% interval {last.low:+.2f} to {last.high:+.2f}; "
        f"above 0 on {last.share_positive:.0%} of the prompts)."
    )
    if last.score > 0:
        allowed = last.score / last.beta
        yield (
            f"The penalty takes the whole score margin back only at {last.score:.2f} / {last.beta:.3g} = "
            f"{_nats(allowed)} nats: until then {contrast.being} pays, even where the reference finds it "
            f"e^{_nats(allowed)} times less likely than {less}."
            if allowed < HARDLY
            else f"The penalty would take the whole score margin back at {allowed:.0f} nats, which no answer of this "
            f"length reaches."
        )
    by_tercile = [margin(contrast.pairs[-1], tercile) for tercile in TERCILES]
    names = ("briefest", "middle", "longest")
    listed = [f"{name} {one.net:+.2f}" for name, one in zip(names, by_tercile, strict=True) if one is not None]
    if len(listed) > 1:
        yield f"By how long the reference answers, the net margin is: {', '.join(listed)}."


def _nats(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def _charged(last: Margin) -> str:
    """Where KL costs on some prompts and pulls back on others, what is charged."""
    charged = last.kl_cost / last.beta
    if abs(charged - last.kl) <= CLOSE * max(charged, 1.0):
        return ""
    return f" on average, and by {charged:.1f} where only prompts count on which it did and KL costs"


def _length_cost(last: Margin) -> str:
    return f", and the length penalty {last.length_cost:.2f}" if last.length_cost else ""


def _when_it_paid(margins: Sequence[Margin]) -> Iterator[str]:
    if len(margins) < 3:
        return
    paid = [one.step for one in margins if one.pays]
    if len(paid) == len(margins):
        yield "It paid at every look of the run: the penalty never caught up."
    elif paid and not margins[-1].pays:
        yield f"It paid until {paid[-1]} updates; since then the penalty takes it back."


def _price(view: View) -> Iterator[str]:
    """What the last nats bought, against what they cost."""
    score, kl = view.metric("evaluation/score", "evaluation"), view.metric("evaluation/kl_per_sequence", "evaluation")
    beta = view.metric("kl/beta")
    if score is None or kl is None or beta is None or len(score.values) < 3 or len(score.values) != len(kl.values):
        return
    first = max(0, len(kl.values) - max(2, round(len(kl.values) * LATE)) - 1)
    nats, gained = float(kl.values[-1] - kl.values[first]), float(score.values[-1] - score.values[first])
    now = float(beta.values[-1])
    yield (
        f"All in all the answers' KL of {kl.values[-1]:.3g} nats costs {now * float(kl.values[-1]):.2f} reward, "
        f"against a score gain of {score.values[-1] - score.values[0]:+.2f}."
    )
    if nats > 0.5:
        price = gained / nats
        pays = "more" if price > now else "less"
        yield (
            f"Late in the run ({int(kl.steps[first])} to {int(kl.steps[-1])} updates) another nat bought {price:.3g} "
            f"score, {pays} than the {now:.3g} reward it costs."
        )
