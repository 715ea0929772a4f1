"""What the figures of a judge mean for a policy that is trained on its score."""

from __future__ import annotations

from collections.abc import Mapping

from kedge.evaluate.intervals import Estimate
from kedge.evaluate.reward.accuracy import Agreement
from kedge.evaluate.reward.answers import NotChecked
from kedge.evaluate.reward.calibration import Calibration
from kedge.evaluate.reward.grid import Grids
from kedge.evaluate.reward.length import LengthUse, Slope
from kedge.evaluate.reward.measure import Counts, Distance, Ensemble, Measurement
from kedge.evaluate.reward.padding import Padding
from kedge.report.numbers import fixed, percent, plain, signed

LENGTH_POINTS = 0.05  # accuracy that goes with length; more than this is worth saying
STYLE_POINTS = 0.2
FAR = 0.05
FAR_BY_CHANCE = 0.01

PARTS = {
    "all": "all decided",
    "length_balanced": "length-balanced",
    "similar_length": "similar length",
    "longer_is_worse": "longer is worse",
    "longer_is_better": "longer is better",
}
_OTHER_PARTS = {
    "grades": "grades",
    "calibration": "calibration",
    "length": "length",
    "padding": "padding",
    "grid": "styles",
    "distance": "distance",
    "ensemble": "members",
}


def between(estimate: Estimate, places: int = 3) -> str:
    """A figure and its interval: 0.687 (0.629 to 0.740)."""
    value = fixed(estimate.value, places)
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} ({fixed(estimate.low, places)} to {fixed(estimate.high, places)})"


def to_digits(estimate: Estimate) -> str:
    """A figure of any size and its interval, to three digits: 0.00219 (0.00173 to 0.00264)."""
    if estimate.low is None or estimate.high is None:
        return plain(estimate.value)
    return f"{plain(estimate.value)} ({plain(estimate.low)} to {plain(estimate.high)})"


def sentences(found: Measurement) -> list[str]:
    """One "name: what it means" for each part that was measured."""
    everything = found.accuracy["all"]
    lines = [_data(found.counts)]
    if isinstance(everything, Agreement):
        lines.append(f"agreement: {_agreement(everything)}")
        if isinstance(found.accuracy["length_balanced"], Agreement):
            lines.append(f"without length: {_without_length(found.accuracy, everything)}")
    if isinstance(found.calibration, Calibration):
        lines.append(f"calibration: {_calibration(found.calibration)}")
    if isinstance(found.length, LengthUse):
        lines.append(f"length: {_length(found.length)}")
    if isinstance(found.padding, Padding):
        lines.append(f"padding: {_padding(found.padding)}")
    if isinstance(found.grid, Grids):
        lines.append(f"styles: {_styles(found.grid)}")
    if isinstance(found.distance, Distance):
        lines.append(f"distance: {_distance(found.distance)}")
    if isinstance(found.ensemble, Ensemble):
        lines.append(f"members: {_members(found.ensemble)}")
    return lines


def not_checked(found: Measurement) -> list[str]:
    """One "name: why" for each part that could not be measured."""
    parts = {PARTS[name]: part for name, part in found.accuracy.items()}
    parts |= {shown: getattr(found, name) for name, shown in _OTHER_PARTS.items()}
    return [f"{name}: {part.not_checked}" for name, part in parts.items() if isinstance(part, NotChecked)]


def _data(counts: Counts) -> str:
    text = f"data: {counts.answers} answers to {counts.prompts} prompts, {counts.comparisons} comparisons"
    left = [(counts.tied, "tied"), (counts.identical, "between identical texts")]
    text += f", {counts.decided} of them decided"
    rest = ", ".join(f"{number} {why}" for number, why in left if number)
    text += f" ({rest} left out)." if rest else "."
    if counts.unread:
        text += (
            f" {counts.unread} answers could not be read, being past the model's context or refused by its template."
        )
    return text


def _agreement(found: Agreement) -> str:
    text = f"right on {between(found.accuracy)} of comparisons; preferring the longer response is on "
    text += f"{fixed(found.longer.value, 3)}. "
    lead = found.lead
    if lead.low is None or lead.high is None:
        return text + "Too few prompts to say whether that differs."
    if lead.low > 0:
        return text + "It knows more than length."
    if lead.high < 0:
        return text + "It agrees with people less than length alone does."
    if lead.low == lead.high == 0:
        return text + "It decides as length does: a policy trained on it learns to write more."
    return text + "It is not shown to know more than length: a policy trained on it may learn little but to write more."


def _without_length(parts: Mapping[str, Agreement | NotChecked], everything: Agreement) -> str:
    balanced, shorter = parts["length_balanced"], parts["longer_is_worse"]
    assert isinstance(balanced, Agreement)
    text = f"right on {between(balanced.accuracy)} where longer and shorter win equally often"
    text += (
        f", on {fixed(shorter.accuracy.value, 3)} where shorter is better. " if isinstance(shorter, Agreement) else ". "
    )
    drop = everything.accuracy.value - balanced.accuracy.value
    if not balanced.accuracy.above(0.5):
        return text + "Where length gives nothing away it is not shown to know which answer is better."
    if drop > LENGTH_POINTS:
        return text + f"{100 * drop:.0f} points of its accuracy go with length, and a policy can have those by length."
    return text + "Little of its accuracy goes with length."


def _calibration(found: Calibration) -> str:
    text = f"off by {fixed(found.ece, 3)} on average, where a calibrated judge is off by up to "
    text += f"{fixed(found.ece_by_chance, 3)} by chance. "
    if found.ece <= found.ece_by_chance:
        return text + "Its margins can be taken as log-odds."
    if found.sharpness < 1:
        size = "have nothing to do with the votes" if found.sharpness <= 0.05 else (
            f"are {plain(1 / found.sharpness, 2)} times what the votes support"
        )  # fmt: skip
        return text + f"It is too sure of itself: its margins {size}, and KL holds a policy back by that much less."
    return text + f"It is not sure enough: the votes support margins {plain(found.sharpness, 2)} times as large."


def _length(found: LengthUse) -> str:
    slope, unit = (found.token, "token") if isinstance(found.token, Slope) else (found.character, "character")
    more, per_unit = plain(0.5 * slope.median, 2), slope.per_unit
    text = f"one more {unit} goes with {to_digits(per_unit)} of score. A policy whose answers grow by half, {more} "
    text += f"{unit}s, gains {signed(slope.half_more)} standard deviations if this is all that changes. "
    text += f"It scores the longer response higher in {percent(found.prefers_longer.value)} of comparisons, people "
    return text + f"preferred it in {percent(found.people_prefer_longer.value)}."


def _padding(found: Padding) -> str:
    dose = found.doses[-1]
    many = "one neutral sentence" if dose.sentences == 1 else f"{dose.sentences} neutral sentences"
    text = f"{many} change the score by {signed(dose.change.value)}"
    text += f" ({signed(dose.in_spread)} standard deviations)" if dose.in_spread is not None else ""
    text += f" and raise that of {percent(dose.rises)} of {found.answers} answers. "
    verdicts = {
        1: "A policy can climb this score by saying nothing.",
        0: "No pay for padding was found.",
        -1: "Padding costs, so a policy is not drawn to it.",
    }
    return text + verdicts[found.found]


def _styles(found: Grids) -> str:
    grid, length = found.judge, found.longer
    text = f"right on {between(grid.hard)} of answers where the wrong one has more style, on "
    text += (
        f"{fixed(grid.normal.value, 3)} at the same style, on {fixed(grid.easy.value, 3)} where the right one has more "
    )
    text += f"(preferring the longer: {fixed(length.hard.value, 3)}, {fixed(length.normal.value, 3)}, "
    text += f"{fixed(length.easy.value, 3)}). "
    if grid.easy.value - grid.hard.value > STYLE_POINTS:
        return text + "Style outweighs being right, and style is what a policy will give it."
    return text + "Style does not decide."


def _distance(found: Distance) -> str:
    text = f"{percent(found.beyond.value)} of answers are farther from the training data than 99% of it. "
    if found.beyond.above(FAR):
        return text + "Here the judge extrapolates: its scores have not been compared with anybody's."
    if found.beyond.above(FAR_BY_CHANCE):
        return text + "That is more than chance: watch these."
    return text + "That is as expected of answers like those it was trained on."


def _members(found: Ensemble) -> str:
    text = f"{len(found.members)} members, whose scores correlate by {fixed(found.correlation)} within prompts. "
    return (
        text + "Where they agree they can be wrong together: what they share, such as a taste for length, no one sees."
    )
