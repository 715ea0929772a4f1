"""One finding for each answer: its status, and what it will do to a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from kedge.data.audit.agreement import Agreement
from kedge.data.audit.annotators import Annotator, Drift
from kedge.data.audit.cycles import Cycles
from kedge.data.audit.domain import DomainMix
from kedge.data.audit.duplicates import Duplicates
from kedge.data.audit.findings import FEW, Finding, Status, by_share, excludes, missing, percent, shares, span
from kedge.data.audit.format import MarkEffect
from kedge.data.audit.leakage import Leakage, PromptUse
from kedge.data.audit.length import LabelLength, LengthBias
from kedge.data.audit.noise import Noise
from kedge.data.audit.position import PositionBias
from kedge.data.audit.shift import Shift
from kedge.data.audit.tables import Tables

LENGTH_REMEDY = (
    'Train with reward.length = "padded_pairs" or "padded_residual", which price length by itself, or with "two_head", '
    '"residual", "product" or "resample", which read it off these labels; look at length-balanced accuracy and the '
    "padding probe of `kedge reward evaluate`; give the policy a KL control or a length penalty."
)
RARE = 0.01  # p, after correction for how many were looked at


def rejected(tables: Tables) -> Finding:
    share = tables.rejected_count / tables.total
    evidence = {"rejected": tables.rejected_count, "rows": tables.total}
    if not tables.rejected_count:
        return Finding("rejected", "ok", f"All {tables.total:,} rows can be used.", evidence)
    return Finding(
        "rejected",
        by_share(share, 0.0, 0.05),
        f"{tables.rejected_count:,} of {tables.total:,} rows ({percent(share)}) cannot be used; the first: "
        f"{tables.rejected[0]}.",
        evidence,
        "Rows that are left out are seldom a random part: whole tasks or annotators may be missing.",
        "Look at every rejected row with `kedge data check FILE`, then correct or remove it.",
    )


def mixed_kinds(tables: Tables) -> Finding:
    told = ", ".join(f"{count:,} {kind}" for kind, count in sorted(tables.kinds.items()))
    return Finding(
        "kinds",
        "look",
        f"The file mixes kinds: {told}. Columns, annotators and drift were looked at on single responses alone.",
        {"kinds": dict(tables.kinds)},
        "Losses of different kinds have different scales, and one may drown the other.",
        "Keep a file for each kind and audit each.",
    )


def duplicates(found: Duplicates, rows: int) -> Finding:
    share = found.duplicates / rows
    evidence = {"duplicates": found.duplicates, "share": share, "repeated": found.repeated}
    if not found.duplicates:
        return Finding("duplicates", "ok", "No row is there twice.", evidence)
    return Finding(
        "duplicates",
        by_share(share, 0.001, 0.1),
        f"{found.duplicates:,} rows ({percent(share)}) repeat an earlier one.",
        evidence,
        "Repeated rows count several times in the loss, and with a split by row the copies in the held-out part make "
        "accuracy look better than it is.",
        "Remove the copies, or split by prompt (Kedge always does) and weight each pair once.",
    )


def near_duplicates(found: Duplicates) -> Finding:
    prompts, responses = found.near_prompts, found.near_responses
    share = max(prompts.share, responses.share)
    says = (
        f"{percent(prompts.share)} of prompts and {percent(responses.share)} of responses have a near-duplicate, "
        f"among {prompts.texts:,} of {prompts.total:,} distinct prompts and {responses.texts:,} of "
        f"{responses.total:,} distinct responses compared."
    )
    evidence = {
        "prompts": asdict(prompts) | {"share": prompts.share},
        "responses": asdict(responses) | {"share": responses.share},
    }
    status = by_share(share, 0.05, 0.3)
    if status == "ok":
        return Finding("near_duplicates", status, says, evidence)
    return Finding(
        "near_duplicates",
        status,
        says,
        evidence,
        "A split by exact prompt leaves near copies on both sides, so held-out accuracy is optimistic; templates weigh "
        "more than other rows.",
        "Split by family of prompts, and keep one of each family where they say the same.",
    )


def identical(found: Duplicates, pairs: int) -> Finding:
    evidence = {"identical": found.identical, "decided": found.identical_decided}
    if not found.identical:
        return Finding("identical", "ok", "No pair compares a response with itself.", evidence)
    return Finding(
        "identical",
        "look" if found.identical_decided or found.identical > 0.01 * pairs else "ok",
        f"{found.identical:,} pairs compare a response with itself, {found.identical_decided:,} of them with a winner.",
        evidence,
        "Such a pair has a loss of log 2 whatever the model says: it teaches nothing and holds accuracy down. One with "
        "a winner is a wrong label for certain.",
        "Remove them.",
    )


def empty(found: Duplicates, rows: int) -> Finding:
    evidence = {"empty": found.empty}
    if not found.empty:
        return Finding("empty", "ok", "No response is empty.", evidence)
    return Finding(
        "empty",
        by_share(found.empty / rows, 0.001, 0.1),
        f"{found.empty:,} responses are empty.",
        evidence,
        "Nearly all of them lose, so the model learns that anything beats nothing: an easy pair that raises accuracy "
        "and says little about answers that a policy gives. It also steepens the length slope.",
        "Remove them unless saying nothing is an answer that should be judged.",
    )


def contradictory(found: Duplicates) -> Finding:
    evidence = {"contradictory": found.contradictory, "repeated": found.repeated}
    if not found.repeated:
        return missing("contradictory", "Nothing was judged twice, so no label can contradict another.", **evidence)
    share = found.contradictory / found.repeated
    says = f"{found.contradictory:,} of the {found.repeated:,} that were judged more than once have opposite labels."
    if not found.contradictory:
        return Finding("contradictory", "ok", says, evidence)
    return Finding(
        "contradictory",
        by_share(share, 0.0, 0.2),
        says,
        evidence,
        "The two gradients cancel, and no model can be right on both: the ceiling of accuracy is below 1.",
        'Decide them by majority, or keep both and train with reward.loss = "flip_aware" or "smoothed".',
    )


def cycles(found: Cycles | None, kinds: Sequence[str]) -> Finding:
    if "rankings" in kinds and "pairs" not in kinds:
        return missing("cycles", "The pairs come from rankings, which cannot contradict themselves.")
    if found is None or found.triangles < FEW:
        count = 0 if found is None else found.triangles
        reason = f"{count} triangles: too few responses to one prompt were compared with one another."
        return missing("cycles", reason, triangles=count)
    evidence = asdict(found) | {"share": found.share}
    left = f" {found.left_out} prompts were too large to look at." if found.left_out else ""
    says = (
        f"{found.cyclic:,} of {found.triangles:,} triangles ({percent(found.share)}) are cycles; coin tosses would "
        f"give {percent(found.chance)} ({shares(found.chance_ci)}).{left}"
    )
    if found.p < RARE and found.share < 0.5 * found.chance:
        return Finding("cycles", "ok", says, evidence)
    return Finding(
        "cycles",
        "look" if found.p < RARE else "bad",
        says,
        evidence,
        "No score can satisfy a cycle. With about as many as coins give, there is hardly one order that annotators "
        "share, and a reward model learns a mixture of tastes or noise.",
        "Look at whether the question to the annotators has one answer; collect more votes on each pair; with several "
        "tastes, train a model for each.",
    )


def length_bias(found: LengthBias | None, single: LabelLength | None, why: str) -> Finding:
    if found is not None:
        return _pair_length(found)
    if single is None or single.rows < FEW:
        return missing("length_bias", why)
    evidence = {"slope": single.slope, "slope_ci": single.slope_ci, "rows": single.rows}
    unit = "log-odds of good" if single.kind == "verdict" else "standard deviations of the rating"
    says = f"Labels and length: {single.slope:+.2f} {unit} per unit of log length ({span(single.slope_ci)})."
    alarming = excludes(single.wide, 0.0) and abs(single.slope) >= 0.1
    if not alarming:
        return Finding("length_bias", "ok", says, evidence)
    strong = abs(single.slope) >= (1.0 if single.kind == "verdict" else 0.5)
    direction = "longer" if single.slope > 0 else "shorter"
    return Finding(
        "length_bias",
        "bad" if strong else "look",
        says,
        evidence,
        f"A reward model can get part of the labels right by preferring the {direction} response, and a policy "
        f"trained on it will drift towards {direction} answers. Part of the slope may be quality: compare within a "
        "prompt and within a domain.",
        LENGTH_REMEDY,
    )


def _pair_length(found: LengthBias) -> Finding:
    evidence = {
        key: value for key, value in asdict(found).items() if key not in ("curve", "wide") and value is not None
    }
    says = (
        f"The longer response wins {percent(found.longer_wins)} of {found.pairs:,} decided pairs of unequal length "
        f"({shares(found.longer_wins_ci)}); slope {found.slope:+.2f} per unit of log length ratio "
        f"({span(found.slope_ci, '{:+.2f}')})."
        if found.slope is not None
        else f"The longer response wins {percent(found.longer_wins)} of {found.pairs:,} pairs."
    )
    if found.pairs < FEW:
        return missing("length_bias", f"{found.pairs} decided pairs of unequal length are too few. {says}", **evidence)
    steep = abs(found.slope or 0.0)
    if not (excludes(found.wide, 0.0) and max(steep, 4 * abs(found.longer_wins - 0.5)) >= 0.1):
        return Finding("length_bias", "ok", says, evidence)
    status: Status = "bad" if abs(found.longer_wins - 0.5) >= 0.1 or steep >= 1.0 else "look"
    if found.slope is not None and found.slope < 0:
        effect = (
            "The slope is negative: shorter responses win. A reward model will pay for brevity, and a policy trained "
            "on it will drift towards short answers and refusals, whatever the question needs."
        )
    else:
        effect = (
            f"A judge that only counts characters is right in {percent(found.length_only_accuracy)} of decided "
            "pairs, so a reward model can reach that without reading, and a policy trained on it will write longer "
            "and longer answers while the score goes up. Part of the slope may be true quality."
        )
    return Finding("length_bias", status, says, evidence, effect, LENGTH_REMEDY)


def format_bias(effects: Sequence[MarkEffect], why: str) -> Finding:
    tested = [effect for effect in effects if effect.p is not None]
    if not tested:
        return missing("format_bias", why)
    alarming = [
        effect for effect in tested if (effect.p or 0.0) * len(tested) < RARE and abs(effect.coefficient or 0.0) >= 0.1
    ]
    evidence = {"tested": len(tested), "marks": {effect.mark: asdict(effect) for effect in tested}}
    if not alarming:
        says = f"None of {len(tested)} marks of style goes with the label at equal length."
        return Finding("format_bias", "ok", says, evidence)
    alarming.sort(key=lambda effect: -abs(effect.coefficient or 0.0))
    told = "; ".join(
        f"{effect.mark} wins {percent(effect.win_rate or 0.0)} of {effect.pairs:,} "
        f"({effect.coefficient:+.2f} at equal length)"
        for effect in alarming
    )
    strong = any(
        abs((effect.win_rate or 0.5) - 0.5) >= 0.1 and abs(effect.coefficient or 0) >= 0.3 for effect in alarming
    )
    return Finding(
        "format_bias",
        "bad" if strong else "look",
        f"Where one side alone has it: {told}.",
        evidence,
        "Marks that win are cheap to produce: a policy will put them everywhere. Marks that lose will vanish, also "
        "where they are needed.",
        "Ask whether annotators meant it; if not, add pairs that differ in the mark alone, and watch its share during "
        'training with a rule of its own ([rewards.NAME], kind = "regex").',
    )


def position_bias(found: PositionBias | None, why: str) -> Finding:
    if found is None:
        return missing("position_bias", why)
    evidence = {"first_wins": found.first_wins, "ci": found.ci, "wilson": found.wilson, "pairs": found.pairs}
    says = (
        f"The response shown first wins {percent(found.first_wins)} of {found.pairs:,} decided pairs "
        f"({shares(found.ci)})."
    )
    if found.pairs < FEW:
        return missing("position_bias", f"{found.pairs} decided pairs of known order are too few.", **evidence)
    away = abs(found.first_wins - 0.5)
    if not (excludes(found.wide, 0.5) and away >= 0.01):
        return Finding("position_bias", "ok", says, evidence)
    return Finding(
        "position_bias",
        "bad" if away >= 0.05 else "look",
        says,
        evidence,
        f"About {percent(2 * away)} more wins went to the {'first' if found.first_wins > 0.5 else 'second'} place than "
        "its answers earned. If places were drawn by chance, that is noise and lowers what a reward model can reach; "
        "if not (as where the first is always of one model), it teaches to prefer that source.",
        'Draw the order by chance and keep it; show doubtful pairs in both orders; train with reward.loss = "smoothed" '
        'or "flip_aware".',
    )


def agreement(found: Sequence[Agreement]) -> Finding:
    known = [one for one in found if one.alpha is not None and one.units >= FEW]
    if not known:
        return missing("agreement", "Fewer than 30 pairs or responses have two labels or counted votes.")
    lowest = min(known, key=lambda one: one.alpha or 0.0)
    alpha = lowest.alpha or 0.0
    evidence = {one.source: asdict(one) for one in found}
    says = "; ".join(
        f"from {one.source}: alpha {one.alpha:.2f}, two labels agree in {percent(one.agree)}, all in "
        f"{percent(one.unanimous)} of {one.units:,}"
        for one in known
    )
    status: Status = "ok" if alpha >= 0.667 else "look" if alpha >= 0.2 else "bad"
    if status == "ok":
        return Finding("agreement", status, f"Krippendorff {says}.", evidence)
    return Finding(
        "agreement",
        status,
        f"Krippendorff {says}.",
        evidence,
        "Where people agree little beyond chance, most of what a model could learn beyond the shared part is noise: "
        "it needs more pairs, ends at a lower accuracy, and fits easy cues such as length first.",
        'Train on the share of votes instead of the winner alone (column strength), with reward.loss = "flip_aware"; '
        "sharpen the instructions; collect more votes on fewer pairs.",
    )


def annotators(found: Sequence[Annotator], named: int) -> Finding:
    if not named:
        return missing("annotators", "No column names the annotator.")
    if not found:
        return missing("annotators", f"None of {named:,} annotators has 50 labels.", annotators=named)
    rated = [one for one in found if one.agrees is not None]
    weak = [one for one in rated if (one.agrees or 0.0) + 2.6 * (0.25 / one.compared) ** 0.5 < 0.6]
    evidence = {"annotators": named, "shown": len(found), "compared": len(rated), "weak": [one.name for one in weak]}
    if not rated:
        reason = f"None of {len(found)} annotators shares 30 decided labels with others."
        return missing("annotators", reason, **evidence)
    lowest = min(rated, key=lambda one: one.agrees or 0.0)
    says = (
        f"{named:,} annotators, {len(rated)} of them compared with the rest: the least agrees in "
        f"{percent(lowest.agrees or 0.0)} ({lowest.name})."
    )
    if not weak:
        return Finding("annotators", "ok", says, evidence)
    return Finding(
        "annotators",
        "bad" if any((one.agrees or 0.0) < 0.5 for one in weak) else "look",
        f"{says} {len(weak)} agree in less than 60%.",
        evidence,
        "Labels near a coin toss add noise; below one half they pull against the others. A model fits both.",
        "Ask them what they looked at; leave their labels out or weigh them by agreement.",
    )


def drift(found: Sequence[Drift]) -> Finding:
    if not found:
        return missing("drift", "Too few labels to compare the first half of the file with the second.")
    least = found[0]
    alarming = [one for one in found if one.p * len(found) < RARE and abs(one.after - one.before) >= 0.05]
    evidence = {"tested": len(found), "changes": [asdict(one) for one in found[:10]]}
    told = f"{least.what}{f' ({least.who})' if least.who else ''}: {least.before:.2f} then {least.after:.2f}"
    if not alarming:
        return Finding("drift", "ok", f"No change along the file; the largest sign is {told}.", evidence)
    return Finding(
        "drift",
        "look",
        f"Labels change along the file: {told}.",
        evidence,
        "A model averages over both halves; a held-out part from the end measures another taste than the one it "
        "learnt. If the file is sorted by task or source, that is what is seen here, not a change of people.",
        "Find what changed (instructions, people, sources, sorting), split by prompt rather than by time, and compare "
        "accuracy on both halves.",
    )


def label_noise(found: Sequence[Noise]) -> Finding:
    if not found:
        return missing("label_noise", "Fewer than 30 pairs or responses have two decided labels or votes.")
    worst = max(found, key=lambda one: one.differ)
    evidence = {one.source: asdict(one) for one in found}
    told = "; ".join(
        f"from {one.source}: two decided labels differ in {percent(one.differ)} of {one.units:,} "
        f"({shares(one.differ_ci)})"
        for one in found
    )
    low, high = worst.ceiling
    says = (
        f"{told[0].upper()}{told[1:]}, which means {percent(worst.flips)} flipped labels if all pairs are as hard. A "
        f"judge that knows the better response would agree with {percent(low)} to {percent(high)} of single labels."
    )
    status: Status = by_share(worst.differ, 0.15, 0.35)
    if status == "ok":
        return Finding("label_noise", status, says, evidence)
    return Finding(
        "label_noise",
        status,
        says,
        evidence,
        "Held-out accuracy on single labels cannot rise above that ceiling; a model that does has learnt to predict "
        "the labellers' habits. Confident mistakes on flipped pairs give the largest gradients.",
        f'Train with reward.loss = "flip_aware" and reward.flip_rate = {min(worst.flips, 0.45):.2f}, or with the '
        "share of votes as strength; judge models by the ceiling, not by 100%.",
    )


def domain(found: Sequence[DomainMix]) -> Finding:
    if not found:
        return missing("domain", "No extra text column of 2 to 64 values with 20 rows each.")
    tests = len(found)
    alarming = [one for one in found if one.p * tests < RARE and one.effect >= 0.1]
    evidence = {
        one.column: {"what": one.what, "effect": one.effect, "p": one.p, "parts": [asdict(part) for part in one.parts]}
        for one in found
    }
    if not alarming:
        says = f"None of {tests} extra columns goes with the label ({', '.join(one.column for one in found)})."
        return Finding("domain", "ok", says, evidence)
    first = alarming[0]
    shares = sorted(first.parts, key=lambda part: -part.share)
    ends = [shares[0], shares[-1]]
    form = percent if first.what != "mean rating" else "{:.2f}".format
    told = ", ".join(f"{form(part.share)} in {part.value!r} ({part.rows:,})" for part in ends)
    others = "".join(f"; also {one.column} ({one.effect:.2f})" for one in alarming[1:4])
    measure = "correlation ratio" if first.what == "mean rating" else "Cramer's V"
    says = f"{first.column} predicts {first.what}: {told}, of {len(first.parts)} values; {measure} {first.effect:.2f}"
    if first.what == "longer wins":
        effect = (
            "Length means something else in each part: one length term for all over-corrects here and "
            "under-corrects there, and the pooled slope depends on the mix."
        )
        remedy = "Report accuracy and length slope for each part; correct length within parts, or train them apart."
    else:
        effect = (
            "A model trained on the pool learns to tell the domain from the prompt, not the quality of a response: "
            "its pooled accuracy looks good and its ranking of two responses to one prompt may be no better than "
            "chance."
        )
        remedy = (
            "Compare responses to the same prompt only (make pairs within it), centre labels within the domain, and "
            "report accuracy for each domain."
        )
    status: Status = "bad" if first.effect >= 0.3 else "look"
    return Finding("domain", status, f"{says}{others}.", evidence, effect, remedy)


def leakage(found: Leakage | None, use: PromptUse) -> Finding:
    evidence = {"prompts": use.prompts, "rows_on_shared_prompts": use.shared}
    hint = f" {percent(use.shared)} of rows share their prompt with another row: split by prompt, never by row."
    if found is None:
        return missing("leakage", f"No evaluation file (--eval FILE).{hint if use.shared > 0 else ''}", **evidence)
    near = found.near_prompts
    evidence |= asdict(found)
    says = (
        f"Of the evaluation file's {found.prompts:,} prompts {percent(found.shared_prompts)} are in the training "
        f"file, and {percent(near.share)} of {near.texts:,} others are near one; of its {found.responses:,} responses "
        f"{percent(found.shared_responses)} are."
    )
    status = by_share(found.shared_prompts + (1 - found.shared_prompts) * near.share, 0.001, 0.05)
    if status == "ok" and found.shared_responses >= 0.2:
        status = "look"
    if status == "ok":
        return Finding("leakage", status, says, evidence)
    return Finding(
        "leakage",
        status,
        says,
        evidence,
        "Accuracy on that file partly measures memory: a model that has seen the prompt, or the very response, need "
        "not generalise.",
        "Split by prompt, never by row, families of near prompts together; report the accuracy without what is shared.",
    )


def shift(found: Shift | None) -> Finding:
    if found is None:
        return missing("shift", "No prompts to compare with (--against PROMPTS).")
    evidence = asdict(found) | {"covered_share": found.covered.share}
    known = "not measured (fewer than 50 prompts)" if found.auc is None else f"{found.auc:.2f} ({span(found.auc_ci)})"
    says = (
        f"{percent(found.covered.share)} of {found.deployed:,} deployment prompts have a near one among "
        f"{found.judged:,} judged prompts; {percent(found.unknown_words)} of their words are new; a classifier tells "
        f"the two apart with AUC {known}."
    )
    low = found.auc_ci[0] if found.auc_ci else 0.5
    status: Status = "bad" if low >= 0.8 else "look" if low >= 0.6 or found.unknown_words >= 0.1 else "ok"
    if status == "ok" and found.auc is None:
        return missing("shift", says, **evidence)
    if status == "ok":
        return Finding("shift", status, says, evidence)
    return Finding(
        "shift",
        status,
        says,
        evidence,
        "On prompts unlike those that were judged, a reward model extrapolates: its scores rest on cues such as length "
        "and tone, and a policy finds the mistakes.",
        "Have pairs judged on deployment prompts, those the classifier finds most foreign first; train several members "
        "(reward.members) and watch their disagreement on the policy's answers.",
    )
