"""slime's training dumps: `--dump-details D` writes `D/train_data/{rollout_id}.pt`, and `D/rollout_data` beside it.

Read in THUDM/slime: `slime/backends/megatron_utils/train_dump_utils.py` @ 1706a092 (`format_version` 2),
`get_responses` and `compute_advantages_and_returns` of `slime/backends/megatron_utils/loss.py` @ 2fc48831,
`slime/ray/rollout.py` @ a51f0714:

- `samples` is a list with one dictionary a sample. `tokens` are prompt and response; all else has one entry per
  response token, cut from the logits before it: entry t is of response token t, and `values` stand before the token.
- `log_probs` are of the policy before the update, `rollout_log_probs` of the inference engine.
- `rewards` of a sample are after GRPO's group normalisation; `raw_reward`, once for the file and in order of
  `rollout_position`, is what was scored.
- `loss_masks` is 0 on what tools wrote, and everywhere in a sample that was removed from the loss.
- `kl` and `returns` are not read: PPO overwrites the former with token rewards, and both follow from the rest.
- The number of the prompt is in `rollout_data` alone, as are text and status.

A .pt file is a pickle. It is loaded with `torch.load(weights_only=True)`, which builds tensors, numbers, text, lists
and dictionaries, and refuses everything else before anything of it runs.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.errors import InputError, Problem
from kedge.importers import Answers, Format, Intake
from kedge.importers.questions import BETA, KL, KL_ESTIMATOR, NORMALISATION, conventions_from
from kedge.importers.records import finite, numbered
from kedge.importers.sequences import (
    DISCOUNTS,
    Malformed,
    Sampled,
    count,
    cut,
    flags,
    nothing_found,
    numbers,
    rows_of,
    token_ids,
    told_normalisation,
)
from kedge.trace.foreign import Conventions, Rows, to_array

FILE = r"(\d+)\.pt"
VERSION = 2
EPSILON = 1e-6
MAGIC = (b"PK\x03\x04", b"\x80")  # of a zip, and of a pickle as torch wrote it before 1.6
COLUMNS: Mapping[str, str] = {
    "rollout_log_probs": "behaviour_logprob",
    "log_probs": "old_logprob",
    "ref_log_probs": "reference_logprob",
    "entropy": "entropy",
    "values": "values",
    "advantages": "advantage",
}


def recognises(path: Path) -> bool:
    """True for a numbered .pt file, or a folder that holds some, itself or in train_data. Looks at four bytes."""
    found = numbered(_folder(path), FILE)
    try:
        with found[0][1].open("rb") as stream:
            return stream.read(4).startswith(MAGIC)
    except (IndexError, OSError):
        return False


def conventions(path: Path, answers: Answers) -> Conventions:  # noqa: ARG001 (the shape of Format)
    """slime puts the score on the last response token; its KL metrics are means over tokens."""
    return conventions_from(answers, trainer="slime", kl_unit="per token", score_position="last", epsilon=EPSILON)


def told(path: Path) -> Answers:
    """What the first step shows of the advantage. Raises InputError where it cannot be read."""
    first = next(read(path, {}, Intake()), None)
    return {} if first is None else told_normalisation(first)


def read(path: Path, answers: Answers, intake: Intake) -> Iterator[Rows]:  # noqa: ARG001 (the shape of Format)
    """One step per file, in order of the rollout ids in their names."""
    found = numbered(_folder(path), FILE)
    if not found:
        raise nothing_found(path, "holds no train_data/{rollout_id}.pt", FORMAT.expected)
    steps = {file: step for step, file in found}
    for file in intake.files(list(steps)):
        dump = _dump(file, steps[file])
        beside = _beside(file, len(dump["samples"]), intake)
        scores = _scores(dump, intake)
        sampled = []
        for place, sample in enumerate(dump["samples"]):
            intake.rows += 1
            try:
                sampled.append(_sampled(sample, scores[place], beside[place]))
            except Malformed as fault:
                intake.leave_out(f"{file}:{place + 1}", str(fault))
        if sampled:
            yield rows_of(steps[file], sampled, intake)


def _folder(path: Path) -> Path:
    inside = path / "train_data"
    return inside if inside.is_dir() else path


def load(file: Path) -> Any:
    """What a .pt file holds, tensors on the CPU.

    Raises InputError where torch is missing, the file is torn, or it holds more than tensors, numbers and text.
    """
    try:
        import torch
    except ImportError:
        what = "a slime dump is a torch file, and torch is not installed"
        raise InputError(Problem(str(file), what, "pip install 'kedge[train]'")) from None
    try:
        stream = file.open("rb")
    except OSError as error:
        raise InputError(Problem(str(file), f"cannot be read: {error.strerror or error}", "check its path")) from None
    with stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about what it does not know; it is refused below
        try:
            return torch.load(stream, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            what = "holds more than tensors, numbers, text, lists and dictionaries, or is torn; nothing in it was run"
            raise InputError(Problem(str(file), what, f"expected: {FORMAT.expected}")) from None
        except Exception:  # a torn zip fails in many ways, by the place where it is torn
            what = "is truncated, or no torch file"
            raise InputError(Problem(str(file), what, f"copy it again; expected: {FORMAT.expected}")) from None


def _dump(file: Path, step: int) -> Mapping[str, Any]:
    """The dump in `file`. Raises InputError unless it is of this format and step."""
    loaded = load(file)
    dump: dict[str, Any] = loaded if isinstance(loaded, dict) else {}
    samples, version = dump.get("samples"), dump.get("format_version")
    if version != VERSION or not isinstance(samples, list) or not all(isinstance(one, dict) for one in samples):
        if isinstance(samples, list) and version is None:
            what, remedy = "no format_version: a rollout dump, or of an older slime", "give the folder train_data"
        else:
            what, remedy = f"not a train dump of format version {VERSION}", f"expected: {FORMAT.expected}"
        raise InputError(Problem(str(file), what, remedy))
    if dump.get("rollout_id") not in (None, step):
        what = f"its rollout_id is {dump['rollout_id']!r}, the file's name says {step}"
        raise InputError(Problem(str(file), what, "the file was renamed; take it from a copy"))
    return dump


def _beside(file: Path, size: int, intake: Intake) -> list[Mapping[str, Any]]:
    """The samples of rollout_data/{id}.pt, with text, number of the prompt and status; empty where it is no help."""
    other = file.parent.parent / "rollout_data" / file.name
    nothing: list[Mapping[str, Any]] = [{}] * size
    if not other.is_file():
        return nothing
    try:
        samples = load(other).get("samples")
    except (InputError, AttributeError):
        intake.note(f"{other.name} of rollout_data cannot be loaded safely, so there is no text from it")
        return nothing
    if not isinstance(samples, list) or len(samples) != size:
        intake.note("rollout_data has other samples than train_data in some step, so there is no text from it there")
        return nothing
    return [sample if isinstance(sample, dict) else {} for sample in samples]


def _scores(dump: Mapping[str, Any], intake: Intake) -> list[float | None]:
    """The raw reward of each sample, in the order of `samples`; None where the file does not tell whose it is."""
    samples, raw = dump["samples"], dump.get("raw_reward")
    raw = to_array(raw).tolist() if raw is not None else None
    if not isinstance(raw, list) or len(raw) != len(samples) or not all(finite(one) for one in raw):
        intake.note("raw_reward is missing or not one for each sample, so scores are absent")
        return [None] * len(samples)
    places = [sample.get("rollout_position", sample.get("sample_index")) for sample in samples]
    if len(samples) > 1 and (None in places or places != sorted(places)):
        intake.note("samples are in no known order, so it is not known whose the raw rewards are; scores are absent")
        return [None] * len(samples)
    return [float(one) for one in raw]


def _sampled(sample: Mapping[str, Any], score: float | None, beside: Mapping[str, Any]) -> Sampled:
    ids = token_ids(_plain(sample.get("tokens")), "tokens")
    length = count(_plain(sample.get("response_lengths")), "response_lengths")
    if not 0 < length <= len(ids):
        raise Malformed("response_lengths does not fit the tokens")
    before = len(ids) - length
    mask = flags(_plain(sample.get("loss_masks")), "loss_masks", length)
    columns = {
        column: np.concatenate((np.full(before, np.nan), numbers(_plain(sample[name]), name, length)))
        for name, column in COLUMNS.items()
        if sample.get(name) is not None
    }
    known = beside if _same(beside, ids) else {}
    return cut(
        ids,
        np.concatenate((np.zeros(before, bool), mask)),
        columns,
        score=score,
        ended=_ended(sample, known),
        group=known.get("group_index"),
        prompt=_text(known.get("prompt")),
        response=_text(known.get("response")),
    )


def _ended(sample: Mapping[str, Any], beside: Mapping[str, Any]) -> bool | None:
    """True where the response was completed; `truncated` alone does not know the aborted from the completed."""
    if isinstance(status := beside.get("status"), str):
        return status == "completed"
    truncated = _plain(sample.get("truncated"))
    return None if truncated is None else not truncated


def _same(beside: Mapping[str, Any], ids: NDArray[Any]) -> bool:
    try:
        return np.array_equal(token_ids(_plain(beside.get("tokens")), "tokens"), ids)
    except Malformed:
        return False


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _plain(value: Any) -> Any:
    """A tensor as an array or a number; other values as they are."""
    if not hasattr(value, "detach"):
        return value
    array = to_array(value)
    return array.item() if array.ndim == 0 else array


FORMAT = Format(
    name="slime",
    title="slime training dumps",
    recognises=recognises,
    expected="train_data/{rollout_id}.pt of --dump-details, format_version 2, samples with tokens, response_lengths, "
    "loss_masks (and log_probs, rollout_log_probs, ref_log_probs, values, advantages)",
    asks=(KL, KL_ESTIMATOR, BETA, NORMALISATION, *DISCOUNTS),
    read=read,
    conventions=conventions,
    told=told,
)
