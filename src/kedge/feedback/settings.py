"""What the lead of a labelling job sets: typed, checked, with the allowed values in the error."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kedge.errors import InputError, Problem

Share = Annotated[float, Field(ge=0, le=1)]
Reason = Annotated[str, Field(min_length=1, max_length=60)]


class Settings(BaseModel):
    """The settings of one labelling job; stored with its items."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("Labelling", min_length=1, max_length=80, description="shown at the top of every page")
    overlap: int = Field(2, ge=1, le=1000, description="annotators asked about an item, unless its import says")
    lease_minutes: float = Field(30.0, gt=0, le=24 * 60, description="until an item that nobody answers is free again")
    threshold: Share = Field(0.8, description="share of the calibration that must be right")
    attempts: int = Field(3, ge=1, le=100, description="of the calibration, until a lead allows more")
    gold_share: Share = Field(0.05, description="of an annotator's items that are hidden gold, while there are any")
    repeat_share: Share = Field(0.05, description="of an annotator's items that are earlier ones with sides swapped")
    repeat_gap: int = Field(10, ge=1, description="judgments between an item and its repeat")
    lowest: int = Field(1, description="the lowest rating")
    highest: int = Field(5, description="the highest rating")
    strength: bool = Field(True, description="ask how much better, after a choice between two")
    reasons: tuple[Reason, ...] = Field(
        ("more correct", "more helpful", "safer", "better written", "better length"),
        max_length=20,
        description="offered after a choice; none of them need be given",
    )

    @model_validator(mode="after")
    def _scale(self) -> Settings:
        if not 1 <= self.highest - self.lowest <= 9:
            raise ValueError("highest must be 1 to 9 above lowest")
        return self

    @property
    def scale(self) -> tuple[int, ...]:
        """The ratings that can be given."""
        return tuple(range(self.lowest, self.highest + 1))


def parse(given: Sequence[str], base: Settings | None = None) -> Settings:
    """`base`, or the defaults, with `key=value` overrides; a list is separated by commas.

    Raises InputError with every problem.
    """
    values: dict[str, Any] = {} if base is None else base.model_dump()
    problems = []
    for one in given:
        key, sign, value = one.partition("=")
        key = key.strip()
        if not sign or key not in Settings.model_fields:
            near = difflib.get_close_matches(key, Settings.model_fields, 1)
            known = f"did you mean {near[0]}?" if near else f"known are {', '.join(Settings.model_fields)}"
            problems.append(Problem(f"--set {one}", "is no setting" if sign else "is not KEY=VALUE", known))
        elif key == "reasons":
            values[key] = tuple(part.strip() for part in value.split(",") if part.strip())
        else:
            values[key] = value.strip()
    if problems:
        raise InputError(problems)
    return build(values, "--set ")


def build(values: Mapping[str, Any], where: str = "") -> Settings:
    """Settings from values; what is wrong names `where` and the key."""
    try:
        return Settings(**values)
    except ValidationError as error:
        found = [(".".join(map(str, one["loc"])) or "highest", one["msg"]) for one in error.errors()]
        raise InputError(
            [Problem(f"{where}{key}", message, "see docs/labelling.md") for key, message in found]
        ) from None
