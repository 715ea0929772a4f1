"""The page about Kedge's PPO beside TRL's: its tests, tables and drawing, from the raw figures alone."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import f as f_distribution
from scipy.stats import ttest_ind

Floats = NDArray[np.float64]

COMMAND = "python benchmarks/trl_ppo/compare.py --trl-python PATH"
WINDOWS = 5
LEVEL = 0.05
FIGURES = {
    "score": "score, standard deviations of the reference's",
    "kl": "KL to the reference, nats per response",
    "length": "length, tokens",
    "entropy": "entropy, nats per token",
}
NAMES = {
    "trl": "TRL 1.12.0",
    "trl-last-token": "TRL, score on the last token",
    "scalar": "Kedge, scalar critic",
    "scalar-epsilon": "Kedge, scalar critic at TRL's pace",
    "channels": "Kedge, a head per channel",
    "own": "Kedge, its own settings",
}
PAIRS = (
    ("scalar", "trl"),
    ("scalar-epsilon", "trl"),
    ("scalar-epsilon", "trl-last-token"),
    ("scalar", "trl-last-token"),
    ("trl-last-token", "trl"),
    ("channels", "trl"),
    ("own", "trl"),
)


@dataclass(frozen=True)
class Point:
    """One figure in one window of steps, on two sides over seeds."""

    figure: str
    window: int
    means: tuple[float, float]
    spreads: tuple[float, float]  # standard deviations over seeds
    error: float  # standard error of the difference of the means
    p: float  # Welch

    @property
    def difference(self) -> float:
        return self.means[0] - self.means[1]

    @property
    def in_spreads(self) -> float:
        """The difference in pooled standard deviations between seeds."""
        return self.difference / float(np.sqrt(np.mean(np.square(self.spreads))))


@dataclass(frozen=True)
class Comparison:
    """Two variants at every point."""

    points: tuple[Point, ...]
    seeds: int

    @property
    def worst(self) -> Point:
        return min(self.points, key=lambda point: point.p)

    @property
    def told_apart(self) -> list[Point]:
        """Points whose difference is beyond chance, with all points tested at once (Bonferroni)."""
        return [point for point in self.points if point.p < LEVEL / len(self.points)]

    def size(self, figure: str) -> float:
        """Mean over windows of the absolute difference, in standard deviations between seeds."""
        return float(np.mean([abs(point.in_spreads) for point in self.points if point.figure == figure]))

    def spread_ratio(self, figure: str) -> float:
        """The first side's standard deviation between seeds over the second's, pooled over windows."""
        both = np.array([point.spreads for point in self.points if point.figure == figure])
        first, second = np.sqrt((both**2).mean(axis=0))
        return float(first / second)

    @property
    def agrees(self) -> bool:
        return not self.told_apart and all(self.size(figure) < 1 for figure in FIGURES)


def compared(found: dict[str, Any], first: str, second: str) -> Comparison:
    """Every figure in every window."""
    points = []
    for figure in FIGURES:
        sides = [_windows(found["curves"][name][figure]) for name in (first, second)]
        for window in range(WINDOWS):
            a, b = (side[:, window] for side in sides)
            p = float(ttest_ind(a, b, equal_var=False).pvalue)
            error = float(np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)))
            means, spreads = (float(a.mean()), float(b.mean())), (float(a.std(ddof=1)), float(b.std(ddof=1)))
            points.append(Point(figure, window, means, spreads, error, p))
    return Comparison(tuple(points), found["seeds"])


def _windows(curves: list[list[float]]) -> Floats:
    """[seeds, WINDOWS] means over consecutive steps; the first step, which is the same policy on all sides, is out."""
    return np.stack([part.mean(axis=1) for part in np.array_split(np.array(curves)[:, 1:], WINDOWS, axis=1)], axis=1)


def _steps(found: dict[str, Any], window: int) -> str:
    part = np.array_split(np.arange(1, found["numbers"]["steps"]), WINDOWS)[window]
    return f"{part[0] + 1}–{part[-1] + 1}"


def page(found: dict[str, Any]) -> tuple[str, str]:
    """The page and its drawing."""
    comparisons = {pair: compared(found, *pair) for pair in PAIRS}
    parts = [
        "# PPO beside TRL's",
        f"Made by `{COMMAND}` ([how](../../benchmarks/trl_ppo/README.md)); raw figures in `trl-ppo.json`.",
        _reading(found, comparisons),
        "![Score, KL, length and entropy over PPO steps: mean and one standard deviation over seeds](trl-ppo.svg)",
        "## The rule, fixed before the runs",
        _rule(found),
        "## Differences",
        _differences(found, comparisons),
        "## Kedge with a scalar critic and TRL, window by window",
        _by_window(found, comparisons["scalar", "trl"]),
        "## At the end",
        _end(found),
        "## What was the same",
        _same(found),
        "## What was not",
        _details(found),
    ]
    return "\n\n".join(parts) + "\n", drawing(found)


def _rule(found: dict[str, Any]) -> str:
    edge, tests = _edge(found["seeds"]), len(FIGURES) * WINDOWS
    rule = f"""Four figures (score, KL, length, entropy) in {WINDOWS} windows of the run; a seed's value is its mean
        over the window's steps. Two variants *agree within seed spread* where (1) Welch's test tells them apart at none
        of the {tests} points, at p < {LEVEL}/{tests} (Bonferroni), and (2) for every figure the difference, averaged
        without its sign over the windows, is smaller than one standard deviation between seeds. With
        {found["seeds"]} seeds, equal spreads have a ratio between {1 / edge:.2f} and {edge:.2f} in 95% of cases."""
    return f"{_paragraph(rule)}\n\n{_paragraph(LOOKED)}"


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def _edge(seeds: int) -> float:
    return float(np.sqrt(f_distribution.ppf(0.975, seeds - 1, seeds - 1)))


LOOKED = """To agree is not to be equal: a point is told apart from about two standard deviations on. The figures were
looked at after 3, 5 and 6 of the 8 seeds; the number of seeds was set to 8, then to 6 to save time, then back to 8. The
rule was not touched. *At TRL's pace* was added after the first of these looks; the other variants were there before."""

NAMED = """Variants of one side differ in what their names say and in nothing else. So what separates *a head per
channel* from *a scalar critic* is the critic (detail 1 of [the thirty](../ppo-details.md)): a value per reward
channel, each learnt over the variance of its own return and started at that return's mean, against one value of their
sum, which starts as the reward model's score, as TRL's does, and knows nothing yet of KL and missing EOS. Which part
of that does it was not taken apart. *Its own settings* adds the clipping of gradients and a wider value clip. Variants
of one side share their seeds, the first batch included: they are not independent of one another."""


def _reading(found: dict[str, Any], comparisons: dict[tuple[str, str], Comparison]) -> str:
    verdicts = "\n".join(f"- {_verdict(found, pair, comparisons[pair])}" for pair in PAIRS)
    return f"{verdicts}\n\n{_paragraph(NAMED)}"


def _verdict(found: dict[str, Any], pair: tuple[str, str], comparison: Comparison) -> str:
    names = f"*{NAMES[pair[0]]}* and *{NAMES[pair[1]]}*"
    largest = max(comparison.size(figure) for figure in FIGURES)
    if comparison.agrees:
        return f"{names} agree within seed spread (largest mean difference {largest:.2f} standard deviations)."
    apart = comparison.told_apart
    where = {point.figure for point in apart}
    figures = ", ".join(figure for figure in FIGURES if figure in where)
    if not apart:
        figures = ", ".join(figure for figure in FIGURES if comparison.size(figure) >= 1)
        return f"{names} do not agree: {figures} is further apart than seeds are, but not told apart by the tests."
    steps = ", ".join(sorted({_steps(found, point.window) for point in apart}, key=lambda s: int(s.split("–")[0])))
    return f"{names} differ in {figures} (steps {steps}), by up to {largest:.1f} standard deviations between seeds."


def _differences(found: dict[str, Any], comparisons: dict[tuple[str, str], Comparison]) -> str:
    head = [*(f"{figure}: difference" for figure in FIGURES), "points told apart", "smallest p", "ratio of spreads"]
    rows = ["| variants | " + " | ".join(head) + " |", "|" + "--|" * (len(head) + 1)]
    for pair, comparison in comparisons.items():
        cells = [f"{NAMES[pair[0]]} – {NAMES[pair[1]]}"]
        for figure in FIGURES:
            mean = np.mean([point.difference for point in comparison.points if point.figure == figure])
            cells.append(f"{mean:+.2f} ({comparison.size(figure):.2f} sd)")
        ratios = [comparison.spread_ratio(figure) for figure in FIGURES]
        cells.append(f"{len(comparison.told_apart)} of {len(comparison.points)}")
        worst = comparison.worst
        cells.append(f"{worst.p:.2g} ({worst.figure}, steps {_steps(found, worst.window)})")
        cells.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
        rows.append("| " + " | ".join(cells) + " |")
    note = "Difference: mean over the windows, and in brackets its size in standard deviations between seeds (rule 2)."
    return "\n".join([note, "", *rows])


def _by_window(found: dict[str, Any], comparison: Comparison) -> str:
    rows = ["| figure | steps | TRL | Kedge | difference | standard errors | p |", "|" + "--|" * 7]
    for point in comparison.points:
        (kedge, trl), (kedge_spread, trl_spread) = point.means, point.spreads
        rows.append(
            f"| {point.figure} | {_steps(found, point.window)} | {trl:.2f} ± {trl_spread:.2f} "
            f"| {kedge:.2f} ± {kedge_spread:.2f} | {point.difference:+.3f} | {point.difference / point.error:+.1f} "
            f"| {point.p:.2g} |"
        )
    return "\n".join(["Mean ± standard deviation over seeds; *p* of one test, not adjusted.", "", *rows])


def _end(found: dict[str, Any]) -> str:
    end = found["end"]
    head = ("variant", "reward gained", "KL, nats", "KL efficiency", "p against TRL", "CPU seconds a run")
    rows = ["| " + " | ".join(head) + " |", "|" + "--|" * len(head)]
    for name, label in NAMES.items():
        columns = {key: np.array([row[key] for row in end["policies"][name]]) for key in ("gain", "kl", "efficiency")}
        usual = [row["efficiency"] for row in end["policies"]["trl"]]
        p = "–" if name == "trl" else f"{ttest_ind(columns['efficiency'], usual, equal_var=False).pvalue:.2g}"
        cells = [f"{column.mean():.2f} ± {column.std(ddof=1):.2f}" for column in columns.values()]
        rows.append("| " + " | ".join([label, *cells, p, f"{found['other'][name]['cpu_seconds']:.0f}"]) + " |")
    note = _paragraph(
        f"""The policies after the last step, on 256 prompts that no training saw, 8 responses each, measured by one
        piece of code. Reward is the score less the penalty for a missing EOS; KL the exact divergence of every
        next-token distribution, summed over the response. KL efficiency is the reward gained over the most that any
        policy can gain at that KL: the exponential tilt of the reference, from 256 samples a prompt. They support the
        tilt up to {end["frontier_end"]:.2f} nats; beyond, its tangent there is used, which makes the efficiency too
        low. At TRL's KL the tilt gains {end["frontier_at_trl"]:.2f}, which is about {end["shortfall_at_trl"]:.2f} too
        low, the samples being finite. CPU seconds: median over seeds on a busy machine, with all that is measured at
        each step."""
    )
    return "\n".join([note, "", *rows])


def _same(found: dict[str, Any]) -> str:
    n = found["numbers"]
    trl, kedge = (", ".join(f"{name} {v}" for name, v in side.items()) for side in found["versions"].values())
    said = sum(other["padding_said"] for other in found["other"].values())
    start = f"""The starting weights, read by both from the same Hugging Face folders: a Llama of width {n["hidden"]}
        and {n["layers"]} layers over {n["vocabulary"]} tokens, trained a little on sentences of a random language,
        and a reward model of the same size fitted to "liked words less disliked words, and a bit for length" on the
        policy's own samples. The critic starts as the reward model, trunk and head. {n["prompts"]} prompts of 3 to 12
        tokens, in a random order every epoch. {n["steps"]} steps of {n["batch"]} responses of at most {n["budget"]}
        tokens at temperature {n["temperature"]:g}, {n["epochs"]} epochs of {n["minibatches"]} minibatches, Adam with
        rate {n["lr"]:g} and epsilon {n["adam_epsilon"]:g}, no weight decay, no schedule, no clipping of gradients,
        clip {n["clip"]:g}, value clip {n["value_clip"]:g}, gamma {n["gamma"]:g}, lambda {n["lam"]:g}, k1 in the
        reward with beta {n["beta"]:g}, a penalty of {n["missing_eos_penalty"]:g} where EOS is missing, advantages
        whitened over the batch, rewards not. float32, one thread."""
    measured = f"""Score, KL, length and entropy of the sampled responses are measured by one piece of code on both
        sides (`benchmarks/trl_ppo/measure.py`), before each update. Seeds 0 to {found["seeds"] - 1}: they change
        sampling and order, not the models. Padding, which to TRL ends a response and to Kedge is a token, was said
        {said:g} times in all runs."""
    own = """*Kedge, its own settings* keeps the rates and sizes, but has a head per channel and clips gradients at
        norm 1 and values at 1 standard deviation of the return, as a recipe does by default."""
    versions = f"TRL's side: {trl}. Kedge's side: {kedge}."
    return "\n\n".join(_paragraph(text) for text in (start, measured, own, versions))


DETAILS = (
    ("detail", "TRL 1.12.0", "Kedge", "here"),
    (
        "where the score lands ([11, 19](../ppo-details.md))",
        "one slot after the last token, to which the values' mask reaches: the critic learns the value after EOS. A "
        "response as long as the longest of its batch has it on the last token",
        "on the last token, with value 0 after it",
        "*TRL, score on the last token* is TRL with that one line changed",
    ),
    (
        "value loss (21)",
        "half the squared error, times 0.1",
        "the same over the running variance of the return, times 1",
        "shared weights there are none, so a factor changes Adam's steps through its epsilon alone; *at TRL's pace* is "
        "Kedge with the critic's epsilon raised by as much",
    ),
    (
        "value clip (21)",
        "0.2 reward units",
        "0.2 standard deviations of the return",
        "the deviation is {deviation} units",
    ),
    ("optimiser (4)", "one for policy and value", "one each", "the same steps: Adam works weight by weight"),
    (
        "clipping of gradients",
        "never: its loop does not read `max_grad_norm`",
        "off here, norm 1 by default",
        "*its own settings* has it",
    ),
    ("whitening (16)", "variance over n - 1", "over n", "one part in a thousand"),
    ("old log-probabilities", "the sampler's", "a scoring pass of the same weights", "rounding"),
    ("temperature", "T + 1e-7", "T", "rounding"),
    ("head of the critic", "no bias", "a bias that starts at 0", "small"),
    (
        "learning rate, bf16, gradient checkpointing, sample generations",
        "falls to 0, on, on, 10",
        "falls to a tenth, off, off, none",
        "constant and off on both sides, by settings",
    ),
)


def _details(found: dict[str, Any]) -> str:
    low, high = found["other"]["scalar"]["return_deviation"]
    rows = [f"| {' | '.join(row)} |".replace("{deviation}", f"{low:.2f} to {high:.2f}") for row in DETAILS]
    return "\n".join([rows[0], "|" + "--|" * len(DETAILS[0]), *rows[1:]])


# The drawing

PANEL, HIGH, LEFT, TOP = 330, 210, 46, 34
COLOURS = {"trl": "#c2571a", "scalar": "#1f6fb2", "channels": "#2d8a57", "trl-last-token": "#8a5aa8"}


def drawing(found: dict[str, Any]) -> str:
    """Four panels: the mean over seeds, with a band of one standard deviation for TRL and the scalar critic."""
    width, height = 2 * PANEL + 20, 2 * (HIGH + 40) + 30
    body = [f'<rect width="{width}" height="{height}" fill="#ffffff"/>']
    for index, (figure, label) in enumerate(FIGURES.items()):
        x, y = (index % 2) * (PANEL + 10), (index // 2) * (HIGH + 40) + 24
        body.append(f'<g transform="translate({x} {y})">{_panel(found, figure, label)}</g>')
    x = 6.0
    for name, colour in COLOURS.items():
        body.append(
            f'<path d="M{x:.0f} 12h18" stroke="{colour}" stroke-width="2" fill="none"{_dash(name)}/>'
            f'<text x="{x + 23:.0f}" y="16">{escape(NAMES[name])}</text>'
        )
        x += 40 + 5.6 * len(NAMES[name])  # about the width of a letter
    title = "PPO of Kedge and of TRL 1.12.0, mean over seeds and one standard deviation"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11" fill="#333"><title>{title}</title>{"".join(body)}</svg>\n'
    )


def _panel(found: dict[str, Any], figure: str, label: str) -> str:
    curves = {name: np.array(found["curves"][name][figure]) for name in COLOURS}
    means = {name: curve.mean(axis=0) for name, curve in curves.items()}
    spreads = {name: curve.std(axis=0, ddof=1) for name, curve in curves.items()}
    bands = [means[name] + side * spreads[name] for name in ("trl", "scalar") for side in (-1, 1)]
    shown = [*bands, *means.values()]
    low, high = min(line.min() for line in shown), max(line.max() for line in shown)
    steps = len(means["trl"])

    def at(step: int, value: float) -> str:
        right, up = step / (steps - 1), (value - low) / (high - low)
        return f"{LEFT + (PANEL - LEFT - 8) * right:.1f} {TOP + (HIGH - TOP - 6) * (1 - up):.1f}"

    parts = [f'<text x="2" y="22">{escape(label)}</text>']
    for value in np.linspace(low, high, 4):
        x, y = at(0, float(value)).split()
        parts.append(f'<path d="M{x} {y}H{PANEL - 8}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{value:.2g}</text>')
    for step in range(9, steps, 10):
        parts.append(f'<text x="{at(step, low).split()[0]}" y="{HIGH + 12}" text-anchor="middle">{step + 1}</text>')
    for name in ("trl", "scalar"):
        edges = [[at(i, v) for i, v in enumerate(means[name] + side * spreads[name])] for side in (1, -1)]
        parts.append(f'<path d="M{"L".join(edges[0] + edges[1][::-1])}Z" fill="{COLOURS[name]}" fill-opacity="0.15"/>')
    for name, mean in means.items():
        points = "L".join(at(i, v) for i, v in enumerate(mean))
        parts.append(f'<path d="M{points}" stroke="{COLOURS[name]}" stroke-width="1.6" fill="none"{_dash(name)}/>')
    return "".join(parts)


def _dash(name: str) -> str:
    return "" if name in ("trl", "scalar") else ' stroke-dasharray="4 3"'
