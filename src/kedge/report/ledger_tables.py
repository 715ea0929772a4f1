"""The ledger of a run as tables of words and as one long table of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.phrases import Phrase
from kedge.diagnose.push import Estimate, Push
from kedge.diagnose.split import LIMIT, Entry
from kedge.diagnose.survey import SIGNS, Account, Survey
from kedge.report.numbers import percent, signed

Array = NDArray[Any]
_SMALL = 5e-4  # per token: a row below it everywhere is not printed
LONG = ("table", "group", "entry", "kind", "quantity", "value", "unit")


@dataclass(frozen=True)
class Table:
    """Rows of a label and cells; those in `totals` are sums of what stands above them."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    totals: frozenset[str] = frozenset()
    note: str = ""


def opening(found: Survey, name: str) -> list[str]:
    """What was read, in which unit, how exact, and what is known of the critics."""
    first, last = found.steps[0], found.steps[-1]
    whole = "holds" if found.gap.holds else f"DOES NOT HOLD, worst at step {found.worst_step}"
    rounding = f" ({found.gap.excess:.1e} beyond its own rounding)" if found.gap.digest > LIMIT else ""
    lines = [
        f"{name}: steps {first} to {last}, {found.responses:,} responses, {found.tokens:,} tokens",
        f"Unit: the advantage as the loss used it, in {found.unit}.",
        f"The parts sum to the advantage within {found.gap.token:.1e} of its standard deviation at every token, and to "
        f"the sums that training wrote within {found.gap.digest:.1e} per token{rounding}: the limit of 1e-05 {whole}.",
    ]
    return lines + [f"{note[0].upper()}{note[1:]}." for note in found.notes]


def unknown(found: Survey) -> list[str]:
    """Which ways of grouping the trace does not know, and why."""
    said = []
    for account in found.accounts:
        if not account.tokens.sum():
            why = f"none of the {account.ungrouped:,} tokens is in a group ({account.note})"
            said.append(f"{account.grouping}: {why if account.labels else account.note}")
    return said


def tables(found: Survey) -> list[Table]:
    """Every table of a survey."""
    made = [account_table(account, found.unit) for account in found.accounts if account.tokens.sum()]
    pushes = [push for push in found.pushes if _varies(push)]
    made += [push_table(pushes)] if pushes else []
    made += [share_table(pushes)] if pushes else []
    made += [phrase_table(found.phrases)] if found.phrases else []
    return made


def account_table(account: Account, unit: str) -> Table:
    """Means per token of every part by group, then what stands beside the sum."""
    rows: list[tuple[str, tuple[str, ...]]] = []

    def put(label: str, values: Array, *, always: bool = False) -> None:
        if always or np.nan_to_num(np.abs(values)).max(initial=0.0) >= _SMALL:
            rows.append((label, tuple("–" if np.isnan(one) else signed(one, 3) for one in values.tolist())))

    kinds: dict[str, list[Entry]] = {"part": [], "side": [], "loss": []}
    for entry in account.sums:
        kinds[entry.kind].append(entry)
    for entry in kinds["part"]:
        put(entry.name, account.per_token(account.sums[entry]))
    put("= advantage", account.per_token(account.advantage), always=True)
    for entry in kinds["side"]:
        put(f"of {entry.of}: {entry.source}", account.per_token(account.sums[entry]))
    put("silenced by the clip", account.per_token(account.silenced.sum(axis=-1)))
    for entry in kinds["loss"]:
        put(f"loss beside it: {entry.source}", account.per_token(account.sums[entry]), always=True)
    put("moved, nats", account.per_token(account.moved), always=True)
    share = np.divide(
        account.silenced_tokens,
        account.signed_tokens,
        out=np.full(account.silenced_tokens.shape, np.nan),
        where=account.signed_tokens > 0,
    )
    for index, sign in enumerate(SIGNS):
        cells = tuple("–" if np.isnan(value) else percent(value) for value in share[:, index])
        if not np.isnan(share).all():
            rows.append((f"silenced, advantage {sign}", cells))
    rows.append(("tokens", tuple(f"{int(count):,}" for count in account.tokens)))
    rows.append(("responses", tuple(f"{int(count):,}" for count in account.responses)))
    note = account.note
    if account.ungrouped:
        note = f"{note}; " if note else ""
        note += f"{account.ungrouped:,} tokens are in no group"
    caption = f"By {account.grouping}, mean per token ({unit})"
    return Table(caption, ("part", *account.labels), tuple(rows), frozenset(["= advantage"]), note)


def push_table(pushes: Sequence[Push]) -> Table:
    """What a natural-gradient step would move, beside what moved."""
    rows = tuple(
        (
            f"{push.measure} ({push.unit})",
            (_interval(push.predicted), _interval(push.moved), signed(push.rate, 3)),
        )
        for push in pushes
    )
    note = (
        "Pushed: covariance of the feature with the advantage of whole responses and the loss's other pushes, within "
        "steps. Moved: covariance with the change of the response's log-probability in the update, mean per step. 95% "
        "intervals over prompts. Where the pushes explain the movement, moved over pushed is one positive number."
    )
    return Table("Pushed and moved, by feature", ("feature", "pushed", "moved", "moved / pushed"), rows, note=note)


def share_table(pushes: Sequence[Push]) -> Table:
    """Shares of the covariance with the advantage, by part, with the raw covariances."""
    entries = list(dict.fromkeys(entry for push in pushes for entry in push.parts))
    rows = []
    for entry in entries:
        cells = [_share(push, entry) for push in pushes]
        if any(cell != "–" for cell in cells):
            rows.append((entry.name, tuple(cells)))
    sums = [sum(part.value for part in push.parts.values()) for push in pushes]
    rows.append(("= advantage", tuple(f"{value:+.3g}" for value in sums)))
    for entry in dict.fromkeys(entry for push in pushes for entry in push.losses):
        rows.append((f"loss beside it: {entry.source}", tuple(f"{push.losses[entry].value:+.3g}" for push in pushes)))
    note = "Covariance (share of the sum). Shares sum to 1; where parts nearly cancel they are large and mean little."
    heads = ("part", *(push.measure for push in pushes))
    return Table("Covariance with each feature, by part", heads, tuple(rows), frozenset(["= advantage"]), note)


def phrase_table(phrases: Sequence[Phrase]) -> Table:
    """Phrases with the channel that pushed them most."""
    rows = tuple(
        (
            one.text,
            (f"{one.count:,}", one.largest, signed(one.by_channel[one.largest], 1), signed(one.advantage, 1)),
        )
        for one in phrases
    )
    note = (
        "Sums over occurrences of the advantage of the phrase's tokens; a channel's reward and critic parts together. "
        "Phrases overlap, so these sums do not add up."
    )
    return Table("Phrases pushed most", ("phrase", "times", "by", "that channel", "advantage"), rows, note=note)


def long_rows(found: Survey) -> Iterator[dict[str, Any]]:
    """Every number of a survey, one a row, with the columns LONG."""
    for account in found.accounts:
        yield from _account_rows(account, found.unit)
    for push in found.pushes:
        yield from _push_rows(push)
    for phrase in found.phrases:
        for channel, value in phrase.by_channel.items():
            yield _row("phrases", phrase.text, channel, "channel", "sum", value, found.unit)
        yield _row("phrases", phrase.text, "advantage", "total", "sum", phrase.advantage, found.unit)
        yield _row("phrases", phrase.text, "", "count", "count", float(phrase.count), "times")


def _account_rows(account: Account, unit: str) -> Iterator[dict[str, Any]]:
    series: list[tuple[str, str, Array]] = [(entry.name, entry.kind, sums) for entry, sums in account.sums.items()]
    series += [("advantage", "total", account.advantage), ("silenced", "clip", account.silenced.sum(axis=-1))]
    series += [("reached", "clip", account.reached)]
    for name, kind, sums in series:
        means = (("sum", sums), ("per token", account.per_token(sums)), ("per response", account.per_response(sums)))
        for quantity, values in means:
            for label, value in zip(account.labels, values.tolist(), strict=True):
                yield _row(account.grouping, label, name, kind, quantity, value, unit)
    for index, label in enumerate(account.labels):
        for sign, word in enumerate(SIGNS):
            counts = (("tokens", account.signed_tokens), ("silenced tokens", account.silenced_tokens))
            for quantity, values in counts:
                value = float(values[index, sign])
                yield _row(account.grouping, label, f"advantage {word}", "clip", quantity, value, "tokens")
        yield _row(account.grouping, label, "moved", "moved", "sum", float(account.moved[index]), "nats")
        yield _row(account.grouping, label, "", "count", "tokens", float(account.tokens[index]), "tokens")
        yield _row(account.grouping, label, "", "count", "responses", float(account.responses[index]), "responses")


def _push_rows(push: Push) -> Iterator[dict[str, Any]]:
    unit = f"{push.unit} × advantage"
    shares, by_token = push.shares(), push.shares(by_token=True)
    for kind, entries in (("part", push.parts), ("loss", push.losses)):
        for entry, estimate in entries.items():
            yield from _estimates("features", push.measure, entry.name, kind, estimate, unit)
    for entry in push.parts:
        if shares:
            yield _row("features", push.measure, entry.name, "part", "share", shares[entry], "1")
        if by_token:
            yield _row("features", push.measure, entry.name, "part", "share, summed over tokens", by_token[entry], "1")
        value = push.by_token[entry]
        yield _row("features", push.measure, entry.name, "part", "covariance, summed over tokens", value, unit)
    yield from _estimates("features", push.measure, "pushed", "total", push.predicted, unit)
    yield from _estimates("features", push.measure, "moved", "moved", push.moved, push.unit)


def _estimates(table: str, group: str, entry: str, kind: str, found: Estimate, unit: str) -> Iterator[dict[str, Any]]:
    for quantity, value in (("covariance", found.value), ("low", found.low), ("high", found.high)):
        yield _row(table, group, entry, kind, quantity, value, unit)


def _row(table: str, group: str, entry: str, kind: str, quantity: str, value: float, unit: str) -> dict[str, Any]:
    return dict(zip(LONG, (table, group, entry, kind, quantity, value, unit), strict=True))


def _varies(push: Push) -> bool:
    """The feature differed between responses."""
    return any(part.value for part in push.parts.values())


def _share(push: Push, entry: Entry) -> str:
    part, shares = push.parts.get(entry), push.shares()
    if part is None or not part.value or abs(shares.get(entry, 1.0)) < _SMALL:
        return "–"
    return f"{part.value:+.3g} ({percent(shares[entry])})" if shares else f"{part.value:+.3g}"


def _interval(found: Estimate) -> str:
    if np.isnan(found.low):
        return f"{found.value:+.3g}"
    return f"{found.value:+.3g} ({found.low:+.3g} to {found.high:+.3g})"
