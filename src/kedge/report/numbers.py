"""Numbers as people read them."""

from __future__ import annotations

import math

UNKNOWN = "not known"
_MINUS = "\u2212"


def plain(value: float | None, digits: int = 3) -> str:
    """`value` to `digits` significant digits, without exponents where that stays short: 0.052, 11.2, 1400, −0.3."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4 or magnitude > 6:
        return f"{value:.1e}".replace("-", _MINUS)
    text = f"{round(value, digits - 1 - magnitude):.{max(0, digits - 1 - magnitude)}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", _MINUS)


def fixed(value: float | None, places: int = 2) -> str:
    """`value` with `places` decimals, for columns that should line up."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{places}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", _MINUS)


def signed(value: float | None, places: int = 2) -> str:
    """Like `fixed` with a plus sign on what is above 0."""
    text = fixed(value, places)
    return f"+{text}" if value is not None and text[0].isdigit() and float(text) > 0 else text


def percent(value: float | None) -> str:
    """A share as a whole percentage."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{100 * value:.0f}%"
