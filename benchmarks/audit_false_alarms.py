"""How often `kedge data audit` cries wolf, and how often it sees a bias that is there.

    python benchmarks/audit_false_alarms.py

Labels are tossed by a coin (no bias), or by a coin that leans towards length, place or lists. Texts are made up, six
pairs a prompt share one prompt effect on length, so rows are not independent. Writes
docs/results/audit-false-alarms.json: of `seeds` files, how many gave a status other than ok for each question.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from kedge.data.audit.format import format_bias
from kedge.data.audit.gather import gather
from kedge.data.audit.length import length_bias
from kedge.data.audit.position import position_bias
from kedge.data.audit.words import format_bias as format_finding
from kedge.data.audit.words import length_bias as length_finding
from kedge.data.audit.words import position_bias as position_finding

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
QUESTIONS = ("length_bias", "position_bias", "format_bias")
TEXT = "the a pen ship rope sail knot wind tide mast deck hull keel oar bow stern port lee helm"
WORDS = TEXT.split()
MARKS = ("- {}\n- {}", "**{}** {}", "{}! {}", "{} 3 {}", "{}\n\n{}", "{}? {}", "`{}` {}", "{} {}")


def write_pairs(path: Path, rng: np.random.Generator, prompts: int, each: int, lean: dict[str, float]) -> None:
    """`lean` is in log-odds: "length" per log length ratio, "position" for the first place, "list" for a list."""
    with path.open("w", encoding="utf-8") as file:
        for prompt in range(prompts):
            typical = rng.lognormal(2.5, 0.6)
            for _ in range(each):
                texts, lists = [], []
                for _ in range(2):
                    words = [WORDS[i] for i in rng.integers(0, len(WORDS), 2 + int(typical * rng.lognormal(0, 0.5)))]
                    form = MARKS[int(rng.integers(len(MARKS)))]
                    lists.append(form.startswith("-"))
                    texts.append(form.format(words[0], " ".join(words[1:])))
                odds = lean.get("length", 0.0) * np.log(len(texts[0]) / len(texts[1])) + lean.get("position", 0.0)
                odds += lean.get("list", 0.0) * (lists[0] - lists[1])
                first = rng.random() < 1 / (1 + np.exp(-odds))
                chosen, rejected = texts if first else texts[::-1]
                row = {"prompt": f"prompt {prompt}", "chosen": chosen, "rejected": rejected}
                file.write(json.dumps(row | {"chosen_pos": 1 if first else 2}) + "\n")


def statuses(path: Path) -> dict[str, str]:
    """The three questions' statuses for a file."""
    pairs = gather(path).pairs
    findings = (
        length_finding(length_bias(pairs), None, ""),
        position_finding(position_bias(pairs), ""),
        format_finding(format_bias(pairs), ""),
    )
    return {finding.name: finding.status for finding in findings}


def rates(seeds: int, prompts: int, each: int, lean: dict[str, float], start: int = 0) -> dict[str, int]:
    """How many of `seeds` files alarm, by question."""
    alarms = dict.fromkeys(QUESTIONS, 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        for seed in range(start, start + seeds):
            write_pairs(path, np.random.default_rng(seed), prompts, each, lean)
            found = statuses(path)
            for name in QUESTIONS:
                alarms[name] += found[name] in ("look", "bad")
    return alarms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200)
    arguments = parser.parse_args()
    worlds: dict[str, tuple[int, int, dict[str, float]]] = {
        "unbiased, 50 prompts of 6": (50, 6, {}),
        "unbiased, 300 prompts of 6": (300, 6, {}),
        "longer, 0.5 per log ratio, 300 of 6": (300, 6, {"length": 0.5}),
        "shorter, -0.5 per log ratio, 300 of 6": (300, 6, {"length": -0.5}),
        "first place, 0.4, 300 of 6": (300, 6, {"position": 0.4}),
        "lists, 0.8, 300 of 6": (300, 6, {"list": 0.8}),
    }
    found = {}
    for name, (prompts, each, lean) in worlds.items():
        seeds = arguments.seeds if not lean else max(1, arguments.seeds // 10)
        found[name] = {"seeds": seeds, "pairs": prompts * each, "alarms": rates(seeds, prompts, each, lean)}
        print(name, found[name])
    text = json.dumps(found, indent=2, sort_keys=True) + "\n"
    (RESULTS / "audit-false-alarms.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
