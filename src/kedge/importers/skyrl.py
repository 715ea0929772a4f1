"""SkyRL's `dumped_data/global_step_{N}_training_input.pkl` is a pickle of SkyRL's own classes: it is not opened here.

Reading a pickle runs what its writer put into it. The importer says so, and gives a script that writes the generic
schema where SkyRL is installed and the dump is one's own.

Read in NovaSky-AI/SkyRL: `skyrl/backends/skyrl_train/training_batch.py` @ 0446435c, the training loop of
`skyrl/train/trainer.py`, `convert_prompts_responses_to_batch_tensors` of `skyrl/train/dataset/preprocess.py`:

- `rewards`, and `uids` of the metadata, are popped before the dump: it holds neither score nor number of the prompt.
- Rows are padded on the left; older versions pad responses on the right. `response_mask` is 1 on response tokens in
  both, `loss_mask` on those of the policy. `metadata["pad_size"]` copies of the first row stand at the end.
- Entry t of the response columns is of response token t; `values` stand before the token.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kedge.errors import InputError, Problem
from kedge.importers import Answers, Format, Intake
from kedge.importers.questions import conventions_from
from kedge.importers.records import numbered
from kedge.trace.foreign import Conventions, Rows

FILE = r"global_step_(\d+)_training_input\.pkl"
SCRIPT = '''\
"""Write SkyRL's dumped_data/global_step_N_training_input.pkl as JSONL that `kedge import` reads.

Usage: python skyrl_to_kedge.py DUMPED_DATA OUT
Run it where SkyRL is installed, on dumps of your own: unpickling runs code that is in the file.
"""

import json
import pickle
import re
import sys
from pathlib import Path

COLUMNS = {
    "rollout_logprobs": "behaviour_logprob",
    "action_log_probs": "old_logprob",
    "base_action_log_probs": "reference_logprob",
    "values": "values",
    "advantages": "advantage",
}

source, out = map(Path, sys.argv[1:])
out.mkdir(parents=True)
(out / "conventions.json").write_text('{"trainer": "SkyRL", "kl_unit": "per token"}')
for file in source.glob("global_step_*_training_input.pkl"):
    step = int(re.findall(r"\\d+", file.name)[0])
    batch = pickle.loads(file.read_bytes())
    rows = batch.batch_size - (batch.metadata or {}).get("pad_size", 0)
    with (out / f"step-{step:06d}.jsonl").open("w") as lines:
        for row in range(rows):
            ids = batch["sequences"][row][batch["attention_mask"][row].bool()].tolist()
            response = batch["response_mask"][row].bool()
            split = len(ids) - int(response.sum())
            record = {"step": step, "row": row, "prompt_ids": ids[:split], "response_ids": ids[split:]}
            record["response_mask"] = batch["loss_mask"][row][response].bool().tolist()
            for name, column in COLUMNS.items():
                if batch.get(name) is not None:
                    record[column] = batch[name][row][response].float().tolist()
            if batch.get("rewards") is not None:
                record["score"] = float(batch["rewards"][row][response].sum())
            lines.write(json.dumps(record) + "\\n")
'''


def recognises(path: Path) -> bool:
    """True for a dump, a folder of them, or one with dumped_data in it. Opens nothing."""
    return bool(_dumps(path))


def conventions(path: Path, answers: Answers) -> Conventions:  # noqa: ARG001 (the shape of Format)
    """Nothing is told: nothing is read."""
    return conventions_from(answers, trainer="SkyRL")


def read(path: Path, answers: Answers, intake: Intake) -> Iterator[Rows]:  # noqa: ARG001 (the shape of Format)
    """Raises InputError that holds the script."""
    folder = _dumps(path)[0][1].parent if _dumps(path) else path
    what = "a SkyRL dump is a pickle, and reading one runs what is in it; Kedge opens none"
    remedy = (
        f"where SkyRL is installed, save the script below as skyrl_to_kedge.py, run "
        f"`python skyrl_to_kedge.py {folder} OUT`, then `kedge import OUT --out RUN`\n\n{SCRIPT}"
    )
    raise InputError(Problem(str(path), what, remedy))


def _dumps(path: Path) -> list[tuple[int, Path]]:
    inside = path / "dumped_data"
    return numbered(inside if inside.is_dir() else path, FILE)


FORMAT = Format(
    name="skyrl",
    title="SkyRL training batches",
    recognises=recognises,
    expected="JSONL that the script of docs/frameworks/skyrl.md makes of global_step_{N}_training_input.pkl; "
    "the pickle itself is not opened",
    asks=(),
    read=read,
    conventions=conventions,
)
