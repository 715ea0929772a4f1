"""Templates into pages. Every text is escaped; what cannot be seen is made visible."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

HERE = Path(__file__).parent
STATIC = {"label.js": "text/javascript; charset=utf-8", "label.css": "text/css; charset=utf-8"}

# Control characters as their pictures; tabs and line ends are text.
PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {127: "\u2421"}
WORDS = {1: "slightly", 2: "clearly", 3: "far better"}
CHOICES = {"left": "Left", "right": "Right", "tie": "Tie", "both_bad": "Both bad"}


@cache
def templates() -> Environment:
    """The environment of all pages."""
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(visible=visible, percent=percent, signed=signed, minutes=minutes)
    environment.globals.update(static=static_url, words=WORDS, choices=CHOICES)
    return environment


def page(template: str, **context: Any) -> str:
    """A page of the site."""
    return templates().get_template(template).render(context)


@cache
def static_file(name: str) -> bytes:
    """The script or the style sheet."""
    return (HERE / "static" / name).read_bytes()


@cache
def static_url(name: str) -> str:
    """Where a page gets the script or style sheet; the address changes with the content."""
    return f"/static/{name}?v={hashlib.sha256(static_file(name)).hexdigest()[:12]}"


def visible(text: str) -> str:
    """Text with pictures for control characters, and one kind of line end."""
    return text.replace("\r\n", "\n").translate(PICTURES)


def percent(value: float | None) -> str:
    """A share for people."""
    return "–" if value is None else f"{100 * value:.0f}%"


def signed(value: float | None) -> str:
    """A slope for people."""
    return "–" if value is None else f"{value:+.2f}"


def minutes(seconds: float | None) -> str:
    """A time on task for people."""
    if seconds is None:
        return "–"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
