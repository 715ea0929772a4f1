"""Inline SVG: line charts and diverging bars. Colours are CSS classes of style.css, so dark mode needs no script.

Every chart has a title and a description in words for readers who do not see it. Text is escaped here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.report.numbers import plain, signed

Array = NDArray[Any]
WIDTH, HEIGHT = 360, 214
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 22, 34


@dataclass(frozen=True)
class Line:
    """One series. `tone` is a colour class; `low` and `high` draw a band; `dashed` marks what is only a yardstick."""

    label: str
    x: Array
    y: Array
    tone: str
    low: Array | None = None
    high: Array | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart; `total` sets it apart as the sum of the others."""

    label: str
    value: float
    total: bool = False


def line_chart(title: str, lines: Sequence[Line], *, x: str, y: str, zero: bool = False, note: str = "") -> str:
    """A figure with a legend, axes and one path per series; an empty string when no series has a finite point.

    `x` and `y` are axis labels with units; `zero` draws a line at 0 and keeps it in view.
    """
    lines = [line for line in map(_finite, lines) if len(line.x)]
    if not lines:
        return ""
    span = min(line.x.min() for line in lines), max(line.x.max() for line in lines)
    xs = _ticks(*span, 5)
    if span[1] > span[0]:
        xs = xs[(xs >= span[0] - 1e-9) & (xs <= span[1] + 1e-9)]
    else:
        span = xs[0], xs[-1]
    tops = [edge for line in lines for edge in (line.y, line.low, line.high) if edge is not None]
    low, high = min(edge.min() for edge in tops), max(edge.max() for edge in tops)
    ys = _ticks(min(low, 0.0) if zero else low, max(high, 0.0) if zero else high, 4)
    frame = _Frame(xs, ys, *span)
    body = [frame.axes(x, y, zero)]
    body += [_band(frame, line) for line in lines if line.low is not None]
    body += [_path(frame, line) for line in lines]
    description = "; ".join(_describe(line) for line in lines)
    return _figure(title, f"{y} over {x}. {description}.", _legend(lines), "".join(body), HEIGHT, note)


def bar_chart(title: str, bars: Sequence[Bar], *, unit: str, limit: float, note: str = "") -> str:
    """Horizontal bars left and right of 0. `limit` is the length of the axis on each side, for charts that compare."""
    limit = limit if limit > 0 and math.isfinite(limit) else 1.0
    label, value, row = 122, 44, 23
    span = (WIDTH - label - value) / 2
    middle = label + span
    bottom = TOP + row * len(bars)
    body = [f'<path class="axis" d="M{middle:.1f} {TOP - 4}V{bottom + 2}"/>']
    for index, bar in enumerate(bars):
        y = TOP + row * index
        known = bar.value if math.isfinite(bar.value) else 0.0
        length = span * min(1.0, abs(known) / limit)
        tone = "total" if bar.total else "up" if known >= 0 else "down"
        start = middle if known >= 0 else middle - length
        if bar.total:
            body.append(f'<path class="grid" d="M0 {y:.1f}H{WIDTH}"/>')
        body.append(
            f'<text class="row" x="{label - 8}" y="{y + 15}" text-anchor="end">{escape(bar.label)}</text>'
            f'<rect class="f-{tone}" x="{start:.1f}" y="{y + 4}" width="{max(length, 0.5):.1f}" height="{row - 8}" '
            f'rx="1.5"/><text class="row" x="{WIDTH}" y="{y + 15}" text-anchor="end">{signed(bar.value)}</text>'
        )
    description = "; ".join(f"{bar.label} {signed(bar.value)}" for bar in bars)
    body.append(f'<text x="{middle:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(unit)}</text>')
    return _figure(title, f"{unit}: {description}.", "", "".join(body), bottom + 24, note)


class _Frame:
    """Data coordinates to the SVG's, for given ticks."""

    def __init__(self, xs: Array, ys: Array, left: float, right: float) -> None:
        self.xs, self.ys, self.left, self.right = xs, ys, float(left), float(right)

    def x(self, value: float) -> float:
        return float(LEFT + (WIDTH - LEFT - RIGHT) * (value - self.left) / (self.right - self.left))

    def y(self, value: float) -> float:
        return float(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.ys[0]) / (self.ys[-1] - self.ys[0]))

    def axes(self, x: str, y: str, zero: bool) -> str:
        floor = HEIGHT - BOTTOM
        grid = "".join(f"M{LEFT} {self.y(tick):.1f}H{WIDTH - RIGHT}" for tick in self.ys)
        marks = "".join(f"M{self.x(tick):.1f} {floor}v4" for tick in self.xs)
        text = [
            f'<text x="{LEFT - 6}" y="{self.y(tick) + 4:.1f}" text-anchor="end">{_tick(tick)}</text>'
            for tick in self.ys
        ] + [
            f'<text x="{self.x(tick):.1f}" y="{floor + 16}" text-anchor="middle">{_tick(tick)}</text>'
            for tick in self.xs
        ]
        line = f'<path class="zero" d="M{LEFT} {self.y(0):.1f}H{WIDTH - RIGHT}"/>' if zero else ""
        middle = (LEFT + WIDTH - RIGHT) / 2
        return (
            f'<path class="grid" d="{grid}"/><path class="axis" d="M{LEFT} {floor}H{WIDTH - RIGHT}{marks}"/>{line}'
            f'{"".join(text)}<text x="0" y="11">{escape(y)}</text>'
            f'<text x="{middle:.1f}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x)}</text>'
        )


def _finite(line: Line) -> Line:
    keep = np.isfinite(line.x) & np.isfinite(line.y)
    low, high = (None if edge is None else edge[keep] for edge in (line.low, line.high))
    return Line(line.label, line.x[keep].astype(float), line.y[keep].astype(float), line.tone, low, high, line.dashed)


def _points(frame: _Frame, x: Array, y: Array) -> list[str]:
    return [f"{frame.x(a):.1f} {frame.y(b):.1f}" for a, b in zip(x, y, strict=True)]


def _path(frame: _Frame, line: Line) -> str:
    points = _points(frame, line.x, line.y)
    path = f'<path class="line s-{line.tone}{_dashed(line)}" d="M{"L".join(points)}"/>'
    if line.dashed or len(points) > 20:
        return path
    dots = "".join(
        f'<circle class="f-{line.tone}" cx="{point.split()[0]}" cy="{point.split()[1]}" '
        f'r="{3.4 if index == len(points) - 1 else 2.2}"/>'
        for index, point in enumerate(points)
    )
    return path + dots


def _band(frame: _Frame, line: Line) -> str:
    if line.low is None or line.high is None:
        return ""
    there, back = _points(frame, line.x, line.high), _points(frame, line.x, line.low)[::-1]
    return f'<path class="band f-{line.tone}" d="M{"L".join(there + back)}Z"/>'


def _describe(line: Line) -> str:
    first, last = plain(float(line.y[0])), plain(float(line.y[-1]))
    return f"{line.label}: from {first} at {plain(float(line.x[0]))} to {last} at {plain(float(line.x[-1]))}"


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) < 2:
        return ""
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 18 8" aria-hidden="true">'
        f'<path class="line s-{line.tone}{_dashed(line)}" d="M0 4H18"/></svg>{escape(line.label)}</li>'
        for line in lines
    )
    return f'<ul class="legend">{items}</ul>'


def _dashed(line: Line) -> str:
    return " dashed" if line.dashed else ""


def _figure(title: str, description: str, legend: str, body: str, height: float, note: str) -> str:
    name = "c" + hashlib.sha256(f"{title}|{description}".encode()).hexdigest()[:10]
    under = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{legend}</figcaption>'
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="{name}t {name}d">'
        f'<title id="{name}t">{escape(title)}</title><desc id="{name}d">{escape(description)}</desc>{body}</svg>'
        f"{under}</figure>"
    )


def _ticks(low: float, high: float, count: int) -> Array:
    """About `count` round numbers that enclose `low` to `high`."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(nice for nice in (1, 2, 2.5, 5, 10) if nice * power >= raw * 0.999)
    return np.arange(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1) * step


def _tick(value: float) -> str:
    return plain(0.0 if abs(value) < 1e-12 else value, 4)
