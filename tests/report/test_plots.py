"""Charts put data where their axes say, and keep quiet about what is not finite."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.report.numbers import fixed, percent, plain, signed
from kedge.report.plots import Bar, Line, _ticks, bar_chart, line_chart


def points(svg: str, tone: str) -> list[tuple[float, float]]:
    path = re.search(rf'<path class="line s-{tone}" d="M([^"]*)"/><circle', svg)
    assert path is not None
    return [(float(x), float(y)) for x, y in (pair.split() for pair in path[1].split("L"))]


def test_points_lie_on_the_labelled_ticks() -> None:
    svg = line_chart("t", [Line("a", np.array([0, 10, 20]), np.array([0.0, 1.0, 2.0]), "policy")], x="u", y="v")
    ticks = {text: float(y) - 4 for y, text in re.findall(r'<text x="36" y="([\d.]+)" text-anchor="end">(.*?)<', svg)}
    below = {
        text: float(x) for x, text in re.findall(r'<text x="([\d.]+)" y="196" text-anchor="middle">([\d.]+)<', svg)
    }
    (x0, y0), (x1, y1), (x2, y2) = points(svg, "policy")
    assert (y0, y1, y2) == pytest.approx((ticks["0"], ticks["1"], ticks["2"]), abs=0.11)
    assert (x0, x1, x2) == pytest.approx((below["0"], below["10"], below["20"]), abs=0.11)
    assert y2 < y1 < y0


def test_not_finite_points_are_left_out() -> None:
    line = Line("a", np.array([0, 1, 2]), np.array([1.0, np.nan, 3.0]), "policy")
    assert len(points(line_chart("t", [line], x="u", y="v"), "policy")) == 2
    nothing = Line("a", np.array([0]), np.array([np.nan]), "policy")
    assert line_chart("t", [nothing], x="u", y="v") == ""


def test_one_point_and_constant_series() -> None:
    for y in (np.array([0.5]), np.array([0.0])):
        assert "nan" not in line_chart("t", [Line("a", np.array([0]), y, "policy")], x="u", y="v")


def test_bars_point_the_right_way_and_text_is_escaped() -> None:
    svg = bar_chart("<b>", [Bar("up", 2.0), Bar("down & out", -1.0), Bar("sum", 1.0, True)], unit="u", limit=2.0)
    rects = re.findall(r'<rect class="f-(\w+)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg)
    (up, x_up, w_up), (down, x_down, w_down), (total, _, w_total) = rects
    assert (up, down, total) == ("up", "down", "total")
    assert float(w_up) == pytest.approx(2 * float(w_down)) == pytest.approx(2 * float(w_total))
    assert float(x_down) + float(w_down) == pytest.approx(float(x_up), abs=0.11)
    assert "&lt;b&gt;" in svg and "<b>" not in svg and "down &amp; out" in svg


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_enclose_the_data_with_round_steps(low: float, width: float) -> None:
    ticks = _ticks(low, low + width, 4)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step and ticks[-1] >= low + width - 1e-6 * step
    assert 2 <= len(ticks) <= 7


def test_numbers() -> None:
    assert [plain(value) for value in (0.0521, 11.23, -0.3, 1400.0, 0.0, 8.0, 1e-7, None, float("nan"))] == [
        "0.0521",
        "11.2",
        "−0.3",
        "1400",
        "0",
        "8",
        "1.0e−07",
        "not known",
        "not known",
    ]
    assert (fixed(-0.001), fixed(1.005, 1), signed(0.5), signed(-0.5), signed(0.0)) == (
        "0.00",
        "1.0",
        "+0.50",
        "−0.50",
        "0.00",
    )
    assert percent(0.876) == "88%"
