"""Small reward models on real human preferences, beside a linear judge and one that prefers the longer answer.

Reads human_pandalm, human_autoj, human_oasst100 and human_ukp_convarg (each pairs.parquet) under the folder that the
environment variable KEDGE_DATA names; writes docs/results/real-preferences.json and .md. Run from the repository root:

    KEDGE_DATA=/path/to/data python benchmarks/real_preferences.py

`--render` writes the page again from the JSON file alone, `--sets` takes only some of the sets and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
COMMAND = "KEDGE_DATA=/path/to/data python benchmarks/real_preferences.py"
SETS = {
    "human_pandalm": "PandaLM test set: three annotators, 7B models, short instructions",
    "human_autoj": "Auto-J test set: one label each, many scenarios of chat",
    "human_oasst100": "OpenAssistant, 100 trees: ranked replies, mostly by volunteers",
    "human_ukp_convarg": "UKPConvArg1: five votes each on which argument convinces more",
}
SEEDS, FOLDS = (0, 1, 2), 3
VOCAB, PROMPT_TOKENS, RESPONSE_TOKENS = 2000, 32, 192
HIDDEN, LAYERS, HEADS = 48, 2, 4
EPOCHS, BATCH, LR, PAIRS = 3, 32, 1e-3, 1500  # of training; at most so many comparisons are drawn from a set
PARTS = ("all", "length_balanced", "longer_is_worse")


def source(name: str) -> Path:
    """The file of a set; ends the process where it is not there."""
    if not os.environ.get("KEDGE_DATA"):
        sys.exit("error: KEDGE_DATA is not set -> name the folder that holds human_pandalm/pairs.parquet")
    file = Path(os.environ["KEDGE_DATA"]) / name / "pairs.parquet"
    if not file.is_file():
        sys.exit(f"error: {file} is not there -> correct KEDGE_DATA")
    return file


def read(name: str) -> tuple[Any, int]:
    """The set as comparisons, grouped as it says itself (by debate, by conversation tree), and its rejected rows."""
    import pyarrow.parquet as parquet

    from kedge.data.validate import load_judgments
    from kedge.evaluate.reward.answers import judged

    file = source(name)
    loaded = load_judgments(file, max_rejected=1.0)
    groups = parquet.read_table(file, columns=["group"])["group"].to_pylist()
    lines = [int(line.rpartition(":")[2]) - 1 for line in loaded.lines]
    return judged(loaded.rows, [groups[line] for line in lines]), len(loaded.rejected)


def measured(name: str) -> dict[str, Any]:
    """Every judge on one set; each answer is scored by a judge that never saw its prompt or another of its group."""
    import numpy as np

    from kedge.evaluate.reward.answers import LENGTH
    from kedge.evaluate.reward.linear import cross_fitted

    table, rejected = read(name)
    found: dict[str, Any] = {
        "prompts": len({prompt for prompt, _ in table.answers}),
        "groups": len(np.unique(table.prompt)),
        "answers": len(table.answers),
        "comparisons": len(table.first),
        "decided": int(table.decided.sum()),
        "rejected": rejected,
    }
    judges = {
        "length": LENGTH,
        "linear": cross_fitted(table),
        "linear_without_length": cross_fitted(table, length=False),
    }
    found["judges"] = {
        key: figures(table, [judge.score(table.answers)], judge.log_odds) for key, judge in judges.items()
    }
    scores, cut = transformers(table)
    found["judges"]["transformer"] = figures(table, scores, 1.0)
    return found | {"cut": cut}


def figures(table: Any, scores: Sequence[Any], log_odds: float | None) -> dict[str, Any]:
    """Accuracy by part, calibration and length; with several seeds their mean, and the accuracy of each."""
    import numpy as np

    from kedge.evaluate.reward.accuracy import Agreement, agreements
    from kedge.evaluate.reward.answers import Judged
    from kedge.evaluate.reward.calibration import calibration
    from kedge.evaluate.reward.length import length_use

    # The same comparisons once for each seed: resampling a group then takes all seeds' judgments of it together.
    shift = np.repeat(np.arange(len(scores)) * len(table.answers), len(table.first))
    several = len(scores)
    stacked = Judged(
        answers=table.answers * several,
        prompt=np.tile(table.prompt, several),
        grade=np.tile(table.grade, several),
        first=np.tile(table.first, several) + shift,
        second=np.tile(table.second, several) + shift,
        share=np.tile(table.share, several),
        verdicts=table.verdicts,
    )
    found = agreements(stacked, np.concatenate(scores))
    used = [length_use(table, one, None) for one in scores]
    sure = [calibration(table, one, log_odds) for one in scores]
    each = [agreements(table, one)["all"] for one in scores]
    return {
        "parts": {part: asdict(found[part]) for part in PARTS},
        "seeds": [one.accuracy.value for one in each if isinstance(one, Agreement)],
        "prefers_longer": float(np.mean([one.prefers_longer.value for one in used])),
        "people_prefer_longer": used[0].people_prefer_longer.value,
        "half_more": float(np.mean([one.character.half_more for one in used])),
        "ece": None if log_odds is None else float(np.mean([one.ece for one in sure])),
        "ece_by_chance": None if log_odds is None else float(np.mean([one.ece_by_chance for one in sure])),
        "sharpness": None if log_odds is None else float(np.mean([one.sharpness for one in sure])),
    }


def transformers(table: Any) -> tuple[list[Any], float]:
    """[A] scores by each seed of small models trained from scratch on the other folds, and the share of texts cut."""
    import numpy as np

    from kedge.data.records import prompt_text
    from kedge.data.tokenise import encode_prompt, encode_response, train_tokenizer
    from kedge.evaluate.reward.linear import folds_of

    texts = [prompt_text(prompt) for prompt, _ in table.answers] + [text for _, text in table.answers]
    tokenizer = train_tokenizer(list(dict.fromkeys(texts)), vocab=VOCAB)
    prompts = [encode_prompt(tokenizer, prompt)[-PROMPT_TOKENS:] for prompt, _ in table.answers]
    whole = [encode_response(tokenizer, text) for _, text in table.answers]
    responses = [ids if len(ids) <= RESPONSE_TOKENS else [*ids[: RESPONSE_TOKENS - 1], ids[-1]] for ids in whole]
    fold = folds_of(table, FOLDS)
    found = []
    for seed in SEEDS:
        scores = np.full(len(table.answers), np.nan)
        for number in range(FOLDS):
            scores[fold == number] = _trained(tokenizer, table, prompts, responses, fold, number, seed)
        found.append(scores)
    return found, float(np.mean([len(ids) > RESPONSE_TOKENS for ids in whole]))


def _trained(
    tokenizer: Any, table: Any, prompts: list[Any], responses: list[Any], fold: Any, number: int, seed: int
) -> Any:
    """Scores of the answers in fold `number` by a model trained on the others."""
    import numpy as np
    import torch

    from kedge.models.load import scratch_policy
    from kedge.models.reward import finished, new_member
    from kedge.rollout.given import as_rollouts
    from kedge.structs import Judgments
    from kedge.train.reward_model import RewardSettings, raw_scores, train_reward_model

    context = PROMPT_TOKENS + RESPONSE_TOKENS
    policy = scratch_policy(
        tokenizer, family="llama", hidden=HIDDEN, layers=LAYERS, heads=HEADS, context=context, seed=seed
    )
    model = new_member(policy, seed)
    use = np.flatnonzero((fold[table.first] != number) & (table.first != table.second))
    use = np.random.default_rng([seed, number]).permutation(use)[:PAIRS]
    rollouts = as_rollouts(prompts, responses, tokenizer.pad_token_id)
    pairs = torch.from_numpy(np.stack([table.first[use], table.second[use]], axis=1))
    share = torch.from_numpy(table.share[use]).float()
    judgments = Judgments(rollouts, pairs, torch.stack([share, 1 - share], dim=1), torch.zeros(len(use)))
    chosen = RewardSettings(epochs=EPOCHS, batch_size=BATCH, lr=LR, seed=seed)
    train_reward_model(model, judgments, "pair", chosen, on_step=lambda step, loss: None)  # noqa: ARG005
    held_out = torch.from_numpy(np.flatnonzero(fold == number))
    return raw_scores(finished(model), rollouts.rows(held_out)).squeeze(1).double().numpy()


def settings() -> dict[str, int]:
    """Of the transformer, as the page states them."""
    return {
        "seeds": len(SEEDS),
        "folds": FOLDS,
        "vocab": VOCAB,
        "prompt_tokens": PROMPT_TOKENS,
        "response_tokens": RESPONSE_TOKENS,
        "hidden": HIDDEN,
        "layers": LAYERS,
        "epochs": EPOCHS,
        "pairs": PAIRS,
    }


def render(found: dict[str, Any]) -> str:
    """The page; every number in it comes from `found`."""
    sections = [_opening(found), *(_section(name, found["sets"][name]) for name in SETS), _reading(found), _cost(found)]
    return "\n\n".join(map(_filled, sections)) + "\n"


def _filled(section: str) -> str:
    """Paragraphs broken at 120 characters; headings and tables as they are."""

    def filled(part: str) -> str:
        text = " ".join(part.split("\n"))
        return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)

    return "\n\n".join(part if part[0] in "#|" else filled(part) for part in section.split("\n\n"))


def _opening(found: dict[str, Any]) -> str:
    shape = found["transformer"]
    return f"""# Reward models on real human preferences

Made by `{COMMAND}`; raw figures in `real-preferences.json`. Every answer is scored by a judge that never saw its
prompt, nor another of its group: debates of UKPConvArg1 and conversation trees of OpenAssistant stay whole. Ties and
identical answers are left out; equal scores count half. Intervals are 95% and resample groups, with all their
comparisons and all seeds; with as few groups as UKPConvArg1 has they are somewhat too narrow. The transformer's size
and training were chosen for what they cost, not by these figures.

Four judges. *Length* prefers the longer answer. *Linear* is a Bradley-Terry model on words, pairs of words and the form
of the answer, with or without logarithms of its length (`evaluate/reward/linear.py`). *Transformer* is a reward model
from scratch by Kedge's own training, {shape["seeds"]} seeds: {shape["layers"]} layers, width
{shape["hidden"]}, a tokenizer of {shape["vocab"]} tokens learnt from the set's texts without labels,
{shape["epochs"]} epochs over at most {shape["pairs"]} comparisons, {shape["folds"]} folds. It reads the last
{shape["prompt_tokens"]} tokens of a prompt and the first {shape["response_tokens"]} of an answer, so in long
answers it sees neither the end nor the length. It has no pretraining: what is measured here is the method on little
data, not what a pretrained model can reach."""


NAMES = {
    "length": "length",
    "linear": "linear",
    "linear_without_length": "linear, without length",
    "transformer": "transformer, mean of seeds",
}


def _section(name: str, found: dict[str, Any]) -> str:
    cut = f"{100 * found['cut']:.0f}% of answers are cut for the transformer"
    lines = [f"## {name}", ""]
    lines += [
        f"{SETS[name]}. {found['decided']:,} decided comparisons of {found['comparisons']:,}, {found['answers']:,} "
    ]
    lines[-1] += (
        f"answers, {found['groups']} groups; {found['rejected']} rows could not be used; {cut}. People preferred "
    )
    lines[-1] += f"the longer answer in {100 * found['judges']['length']['people_prefer_longer']:.1f}% of comparisons "
    lines[-1] += "of unequal length."
    heads = ("judge", "right", "lead over length", "length-balanced", "shorter is better", "prefers longer", "ECE")
    lines += ["", f"| {' | '.join(heads)} |", "|--" * len(heads) + "|"]
    for key, shown in NAMES.items():
        judge = found["judges"][key]
        parts = judge["parts"]
        lead = "–" if key == "length" else _interval(parts["all"]["lead"], "+.3f")
        cells = [
            shown,
            _interval(parts["all"]["accuracy"]),
            lead,
            _interval(parts["length_balanced"]["accuracy"]) if key != "length" else "0.500",
            f"{parts['longer_is_worse']['accuracy']['value']:.3f}",
            f"{judge['prefers_longer']:.3f}",
            "–" if judge["ece"] is None else f"{judge['ece']:.3f} (chance {judge['ece_by_chance']:.3f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = found["judges"]["transformer"]["seeds"]
    lines += ["", f"Transformer by seed: {', '.join(f'{seed:.3f}' for seed in seeds)}. {_verdict(found['judges'])}"]
    return "\n".join(lines)


def _interval(estimate: dict[str, float], form: str = ".3f") -> str:
    return f"{estimate['value']:{form}} ({estimate['low']:{form}} to {estimate['high']:{form}})"


def _verdict(judges: dict[str, Any]) -> str:
    """Which judges are shown to beat length, to lose to it, or neither."""
    groups: dict[str, list[str]] = {"beats length": [], "loses to length": [], "is not told apart from length": []}
    for key in list(NAMES)[1:]:
        lead = judges[key]["parts"]["all"]["lead"]
        outcome = "beats length" if lead["low"] > 0 else "loses to length" if lead["high"] < 0 else None
        groups[outcome or "is not told apart from length"].append(NAMES[key].removesuffix(", mean of seeds"))
    forms = {"beats length": "beat length", "loses to length": "lose to length"}
    forms["is not told apart from length"] = "are not told apart from length"
    said = [
        f"{_listed([f'*{name}*' for name in names])} {what if len(names) == 1 else forms[what]}"
        for what, names in groups.items()
        if names
    ]
    knows = [
        f"*{NAMES[key].removesuffix(', mean of seeds')}*"
        for key in list(NAMES)[1:]
        if judges[key]["parts"]["length_balanced"]["accuracy"]["low"] > 0.5
    ]
    balanced = f"above one half for {_listed(knows)}" if knows else "not shown to be above one half for any judge"
    return f"By the intervals, {'; '.join(said)}. Length-balanced, accuracy is {balanced}."


def _listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 2 else names)


def _reading(found: dict[str, Any]) -> str:
    wins: dict[str, list[str]] = {key: [] for key in list(NAMES)[1:]}
    for name in SETS:
        for key, won in wins.items():
            if found["sets"][name]["judges"][key]["parts"]["all"]["lead"]["low"] > 0:
                won.append(name)
    listed = "; ".join(
        f"*{NAMES[key].removesuffix(', mean of seeds')}* on {', '.join(won) if won else 'none'}"
        for key, won in wins.items()
    )
    judges = [found["sets"][name]["judges"]["linear"] for name in SETS]
    own, people = ([judge[key] for judge in judges] for key in ("prefers_longer", "people_prefer_longer"))
    taste = ""
    if all(mine > theirs for mine, theirs in zip(own, people, strict=True)):
        taste = f"""With length among its features, the linear judge prefers the longer answer in {min(own):.2f} to
{max(own):.2f} of comparisons, more than people on every set ({min(people):.2f} to {max(people):.2f}): it makes a rule
of what is a tendency. """
    return f"""## What this says

Shown to beat the length-only judge: {listed}. {taste}An accuracy near that of the length-only judge is no evidence of
quality: a policy trained on such a judge would be paid for writing more. The columns that hold length still, and not
the first one, say whether there is anything else."""


def _cost(found: dict[str, Any]) -> str:
    cost = found["cost"]
    listed = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"""## Cost

{cost["cpu_s"] / 60:.1f} minutes CPU, {cost["wall_s"] / 60:.1f} minutes wall with {cost["threads"]} thread on a
{cost["cores"]}-core {cost["machine"]} {cost["system"]} machine without GPU, shared with other work at the time (load
average {cost["load_average"]:.1f} over the last 15 minutes). {listed}."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, help="only these; prints their figures and writes nothing")
    parser.add_argument("--render", action="store_true", help="only write the page again from the JSON file")
    arguments = parser.parse_args()
    raw = RESULTS / "real-preferences.json"
    if not arguments.render:
        found = run(arguments.sets or list(SETS))
        if arguments.sets:
            print("\n\n".join(_section(name, found["sets"][name]) for name in arguments.sets))
            return
        RESULTS.mkdir(parents=True, exist_ok=True)
        raw.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    page = render(json.loads(raw.read_text(encoding="utf-8")))
    (RESULTS / "real-preferences.md").write_text(page, encoding="utf-8")


def run(names: Sequence[str]) -> dict[str, Any]:
    """The figures of these sets, what they were made with, and what that took."""
    import numpy
    import scipy
    import torch

    import kedge

    torch.set_num_threads(1)
    began, before = time.monotonic(), time.process_time()
    sets = {}
    for name in names:
        sets[name] = measured(name)
        print(f"{name}: {time.process_time() - before:.0f} s CPU so far", file=sys.stderr)
    return {
        "sets": sets,
        "transformer": settings(),
        "versions": {"Kedge": kedge.__version__, "numpy": numpy.__version__, "scipy": scipy.__version__}
        | {"torch": torch.__version__, "Python": platform.python_version()},
        "cost": {
            "wall_s": time.monotonic() - began,
            "cpu_s": time.process_time() - before,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[2],
            "machine": platform.machine(),
            "system": platform.system(),
        },
    }


if __name__ == "__main__":
    main()
