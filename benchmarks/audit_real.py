"""`kedge data audit` on public sets of judgments whose biases and defects are known.

    KEDGE_DATA=/path/to/data python benchmarks/audit_real.py

The folder holds one folder a set, as named in SETS below. Writes docs/results/audit-real.json with every figure that
the page shows, and docs/results/audit-real.md. With --render only the page is written again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
COMMAND = "KEDGE_DATA=/path/to/data python benchmarks/audit_real.py"

SETS = (
    "human_hh_harmless/pairs",
    "human_ukp_convarg/pairs",
    "human_pandalm/pairs",
    "human_autoj/pairs",
    "human_qa_feedback/pairs",
    "human_oasst100/pairs",
    "human_oasst100/ranked",
    "human_topicalchat/ranked",
    "human_taskmaster_reward/pairs",
    "human_taskmaster_reward/binary",
    "ai_alpaca_eval/pairs v2",
    "ai_alpaca_eval/pairs v1",
    "eval_llmbar/pairs",
    "eval_hhh/pairs",
)


@dataclass(frozen=True)
class Known:
    """What the sets' own documentation states, measured by other code. None: not stated.

    `slope` is point, low and high; `first_wins` a share; `triangles` cycles and all.
    """

    longer_wins: float | None = None
    slope: tuple[float, float, float] | None = None
    duplicates: int | None = None
    identical: int | None = None
    identical_decided: int | None = None
    empty: int | None = None
    repeated: int | None = None
    contradictory: int | None = None
    triangles: tuple[int, int] | None = None
    first_wins: float | None = None


KNOWN = {
    "human_hh_harmless/pairs": Known(0.441, (-0.30, -0.37, -0.23), 0, 0, 0, 3, 0, 0, (0, 0)),
    "human_ukp_convarg/pairs": Known(0.758, (1.95, 1.72, 2.31), 236, 15, 0, 0, 404, 14, (1297, 52788), 0.504),
    "human_pandalm/pairs": Known(0.675, (0.70, 0.51, 0.97), 113, 0, 0, 54, 73, 0, (1, 229), 0.465),
    "human_autoj/pairs": Known(0.716, (0.94, 0.71, 1.25), 1, 7, 1, 1, 0, 0, (0, 1), 0.514),
    "human_qa_feedback/pairs": Known(0.507, (0.34, 0.13, 0.58), 0, 0, 0, 0, 0, 0, (0, 1257), 0.606),
    "human_oasst100/pairs": Known(0.691, (1.03, 0.78, 1.33), 0, 0, 0, 0, 0, 0, (0, 495)),
    "human_topicalchat/ranked": Known(0.672, (1.61, 1.31, 1.96)),
    "human_taskmaster_reward/pairs": Known(0.479, (-0.46, -1.32, 0.14), 0, 5, 5, 0, 0, 0, (0, 0)),
    "ai_alpaca_eval/pairs v2": Known(0.834, (1.76, 1.63, 1.89)),
    "ai_alpaca_eval/pairs v1": Known(0.774, (0.91, 0.80, 1.05)),
    "eval_llmbar/pairs": Known(0.465, (-0.25, -0.42, -0.12), 3, 1, 1, 1, 3, 0, (1, 7), 0.494),
    "eval_hhh/pairs": Known(0.683, (0.75, 0.48, 1.23), 0, 0, 0, 0, 0, 0, (0, 50)),
}
JUDGES = {"v1": "alpaca_eval_gpt4", "v2": "weighted_alpaca_eval_gpt4_turbo"}
# How often two random voters agree and all do, as the documentation states it.
AGREE = {"human_ukp_convarg/pairs": (0.51, 0.19), "human_pandalm/pairs": (0.92, 0.87)}


def audited(data: Path, name: str) -> dict[str, Any]:
    """The JSON of the command for one set, brought to columns that it reads where it has others."""
    from kedge.cli.output import plain
    from kedge.data.audit.whole import as_json, audit

    file_name, _, part = name.partition(" ")
    source = data / f"{file_name}.parquet"
    converted = CONVERTED.get(file_name)
    if converted is None:
        found = as_json(audit(source))
    else:
        import pyarrow.parquet as parquet

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            with path.open("w", encoding="utf-8") as file:
                for row in parquet.read_table(source).to_pylist():
                    file.writelines(json.dumps(one) + "\n" for one in converted(row, part))
            found = as_json(audit(path))
    found = plain(found)
    # Figures alone: no words of the sets, and nothing twice.
    found["findings"] = [{"name": one["name"], "status": one["status"]} for one in found["findings"]]
    for mix in found["domains"].values():
        for piece in mix["parts"]:
            del piece["value"]
    for key in ("file", "problems", "drift"):
        del found[key]
    return found


def _alpaca(row: Mapping[str, Any], judge: str) -> Iterator[dict[str, Any]]:
    """The model's text and the baseline's; the preference is a share.

    Left out: rows of the other judge, without a preference, and of the baseline against itself.
    """
    if row["p_model"] is None or row["variant"] == "self" or row["judge"] != JUDGES[judge]:
        return
    ours = row["p_model"] >= 0.5
    sides = (row["model_output"], row["baseline_output"])
    chosen, rejected = sides if ours else sides[::-1]
    strength = max(row["p_model"], 1 - row["p_model"])
    yield {
        "prompt": row["prompt"], "chosen": chosen, "rejected": rejected, "strength": strength
    }  # fmt: skip


def _topicalchat(row: Mapping[str, Any], _: str) -> Iterator[dict[str, Any]]:
    """All pairs of a context's responses by their mean overall rating."""
    for one, other in combinations(range(len(row["responses"])), 2):
        if row["overall"][one] < row["overall"][other]:
            one, other = other, one
        tie = row["overall"][one] == row["overall"][other]
        yield {
            "prompt": row["prompt"], "chosen": row["responses"][one], "rejected": row["responses"][other], "tie": tie
        }  # fmt: skip


CONVERTED = {"ai_alpaca_eval/pairs": _alpaca, "human_topicalchat/ranked": _topicalchat}


def render(found: dict[str, Any]) -> str:
    """The page from the figures."""
    parts = [_opening(found), _length(found), _defects(found), _agreement(found), _domains(found), _alarms(found)]
    return "\n\n".join([*parts, NOTES])


def _opening(found: dict[str, Any]) -> str:
    rows = sum(one["rows"] for one in found.values())
    return f"""# The audit on public sets

Made by `{COMMAND}`; raw figures in `audit-real.json`.

{len(found)} files, {rows:,} rows. "Stated" is what the sets' documentation says, measured by other code; its lengths
are in characters and its intervals resample prompts, as here."""


def _length(found: dict[str, Any]) -> str:
    lines = ["## Length bias", "", "| set | pairs | longer wins | stated | slope (95%) | stated | length-only judge |"]
    lines += ["|--|--|--|--|--|--|--|"]
    for name, one in found.items():
        bias = one["length_bias"]
        if bias["slope"] is None:
            continue
        known = KNOWN.get(name, Known())
        slope = f"{bias['slope']:+.2f} ({bias['slope_ci'][0]:+.2f} to {bias['slope_ci'][1]:+.2f})"
        stated = "–" if known.slope is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(*known.slope)
        wins = "–" if known.longer_wins is None else f"{known.longer_wins:.1%}"
        lines.append(
            f"| {name} | {bias['pairs']:,} | {bias['longer_wins']:.1%} | {wins} | {slope} | {stated} | "
            f"{bias['length_only_accuracy']:.1%} |"
        )
    return "\n".join(lines)


def _defects(found: dict[str, Any]) -> str:
    lines = ["## Defects", "", "Each cell is the audit's count, then the stated one in brackets.", ""]
    lines += [
        "| set | duplicates | identical | of them decided | empty | judged twice | opposite | cycles of triangles"
    ]
    lines[-1] += " | first wins |"
    lines += ["|--|--|--|--|--|--|--|--|--|"]
    for name, one in found.items():
        known, cycles, first = KNOWN.get(name, Known()), one["cycles"], one["position_bias"]["first_wins"]
        cells = [
            f"{one[key]:,} ({'–' if getattr(known, key) is None else format(getattr(known, key), ',')})"
            for key in ("duplicates", "identical", "identical_decided", "empty", "repeated", "contradictory")
        ]
        mine = f"{cycles['cyclic']:,} of {cycles['triangles']:,}" if cycles else "0 of 0"
        theirs = "–" if known.triangles is None else f"{known.triangles[0]:,} of {known.triangles[1]:,}"
        cells.append(f"{mine} ({theirs})")
        own = "–" if first is None else f"{first:.1%}"
        cells.append(f"{own} ({'–' if known.first_wins is None else format(known.first_wins, '.1%')})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _agreement(found: dict[str, Any]) -> str:
    lines = ["## Agreement and label noise", ""]
    lines += ["| set | from | units | alpha | two agree | stated | all agree | stated | two decided differ | ceiling |"]
    lines += ["|--|--|--|--|--|--|--|--|--|--|"]
    for name, one in found.items():
        for source, row in one["agreement"].items():
            alpha = "–" if row["alpha"] is None else f"{row['alpha']:.2f}"
            agree, unanimous = AGREE.get(name, (None, None)) if source == "votes" else (None, None)
            noise = one["label_noise"].get(source)
            differ = "–" if noise is None else f"{noise['differ']:.1%}"
            ceiling = "–" if noise is None else f"{noise['ceiling'][0]:.0%} to {noise['ceiling'][1]:.0%}"
            lines.append(
                f"| {name} | {source} | {row['units']:,} | {alpha} | {row['agree']:.0%} | "
                f"{'–' if agree is None else format(agree, '.0%')} | {row['unanimous']:.0%} | "
                f"{'–' if unanimous is None else format(unanimous, '.0%')} | {differ} | {ceiling} |"
            )
    return "\n".join(lines)


def _domains(found: dict[str, Any]) -> str:
    lines = ["## Columns beside the label", "", "Only the strongest column of each set, its two ends.", ""]
    lines += ["| set | column | what | effect | highest | lowest |", "|--|--|--|--|--|--|"]
    for name, one in found.items():
        if not one["domains"]:
            continue
        mix = next(iter(one["domains"].values()))
        parts = sorted(mix["parts"], key=lambda part: -part["share"])
        ends = [f"{part['share']:.0%} of {part['rows']:,}" for part in (parts[0], parts[-1])]
        lines.append(f"| {name} | {mix['column']} | {mix['what']} | {mix['effect']:.2f} | {ends[0]} | {ends[1]} |")
    return "\n".join(lines)


def _alarms(found: dict[str, Any]) -> str:
    lines = ["## What the audit says", "", "| set | bad | look |", "|--|--|--|"]
    for name, one in found.items():
        cells = [
            ", ".join(finding["name"] for finding in one["findings"] if finding["status"] == status) or "–"
            for status in ("bad", "look")
        ]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


NOTES = """## How the counts are defined

- **Duplicates** repeat prompt, chosen, rejected, tie and annotator of an earlier row; strength is no part of it.
- **Judged twice** are pairs of two different responses to one prompt, in either order; **opposite** are those of them
  for which each response won at least once.
- **Triangles** leave out the pairs with opposite winners and ties.
- `ai_alpaca_eval` is two judges against two baselines; rows of a baseline against itself and without a preference are
  left out. Its slope is mostly which model wrote the text. Other counts are stated for both parts together only.
- `human_topicalchat` is brought to pairs by the mean overall rating.
- Of `human_taskmaster_reward/binary` the documentation states 86% and 16% good for its two domains; the files give 86%
  and 14%, counted by hand as well.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="only write the page again from the JSON file")
    arguments = parser.parse_args()
    raw = RESULTS / "audit-real.json"
    if not arguments.render:
        folder = os.environ.get("KEDGE_DATA")
        if not folder:
            raise SystemExit("set KEDGE_DATA to the folder of the sets")
        found = {}
        for name in SETS:
            found[name] = audited(Path(folder), name)
            print(f"{name}: {found[name]['rows']:,} rows")
        raw.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    page = render(json.loads(raw.read_text(encoding="utf-8")))
    (RESULTS / "audit-real.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
