"""What recording costs a training loop: the share of a step's time, and gigabytes per 1,000 steps.

Times a loop with a tiny model and what the recorder takes of it, then hands the recorder the arrays of a large run (no
model is needed for that) and writes docs/results/recording.json and .md; under a minute:

    python benchmarks/recorder_overhead.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kedge.trace.foreign import Conventions, Rows
from kedge.trace.recorder import Recorder

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
BATCH, LENGTH, GROUP, VOCABULARY = 32, 64, 4, 512  # of the tiny run
LARGE = (512, 1024)  # responses and tokens of a step of the large run
STEPS = 20
PARAMETERS, GPUS, SPEED = 7e9, 8, 4e14  # of the large run; FLOP per second and GPU
PASSES = 12  # FLOP per parameter and token: sampling, policy and reference 2 each, forward and backward 6
CONVENTIONS = Conventions(
    "a loop", kl="loss", kl_estimator="k3", beta=0.04, normalisation="group mean and deviation", epsilon=1e-4
)


class Tiny(torch.nn.Module):
    """A recurrent language model that a CPU samples from in a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 128)
        self.cell = torch.nn.GRU(128, 256, batch_first=True)
        self.head = torch.nn.Linear(256, VOCABULARY)

    def forward(self, ids: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, state = self.cell(self.embedding(ids), state)
        return self.head(hidden).log_softmax(-1), state


def sample(model: Tiny) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] tokens and their log-probabilities."""
    token, state, ids, taken = torch.zeros(BATCH, 1, dtype=torch.long), None, [], []
    with torch.no_grad():
        for _ in range(LENGTH):
            logprobs, state = model(token, state)
            token = torch.multinomial(logprobs[:, 0].exp(), 1)
            ids.append(token)
            taken.append(logprobs[:, 0].gather(1, token))
    return torch.cat(ids, 1), torch.cat(taken, 1)


def scored(model: Tiny, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] log-probabilities of the tokens, and entropies."""
    logprobs, _ = model(torch.cat([torch.zeros(BATCH, 1, dtype=torch.long), ids[:, :-1]], 1))
    return logprobs.gather(2, ids[..., None])[..., 0], -(logprobs.exp() * logprobs).sum(-1)


def step(number: int, policy: Tiny, reference: Tiny, optimiser: torch.optim.Optimizer) -> Rows:
    """One GRPO step; the score is the share of even tokens."""
    ids, behaviour = sample(policy)
    with torch.no_grad():
        old, entropy = scored(policy, ids)
        usual, _ = scored(reference, ids)
    score = (ids % 2 == 0).float().mean(1)
    grouped = score.view(-1, GROUP)
    advantage = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
    new, _ = scored(policy, ids)
    gap = usual - new
    loss = -((new - old).exp() * advantage[:, None]).mean() + 0.04 * (gap.exp() - 1 - gap).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return Rows(
        number,
        torch.ones(BATCH, LENGTH, dtype=torch.bool),
        {"even": score},
        group=torch.arange(BATCH) // GROUP,
        response_ids=ids,
        behaviour_logprob=behaviour,
        old_logprob=old,
        reference_logprob=usual,
        new_logprob=new,
        entropy=entropy,
        advantage=advantage,
    )


def tiny_run(folder: Path) -> dict[str, float]:
    """Median CPU seconds of a step without recording, of the loop in the recorder, and of the recorder's thread."""
    torch.manual_seed(0)
    policy, reference = Tiny(), Tiny()
    reference.load_state_dict(policy.state_dict())
    optimiser = torch.optim.Adam(policy.parameters(), lr=1e-3)
    times = []
    with Recorder(folder, CONVENTIONS) as recorder:
        for number in range(STEPS + 1):
            began = time.thread_time()
            rows = step(number, policy, reference, optimiser)
            times.append((time.thread_time() - began, *handed_over(recorder, rows)))
    step_s, waited_s, thread_s = np.median(times[1:], axis=0)  # the first warms up
    return {"step_s": float(step_s), "waited_s": float(waited_s), "thread_s": float(thread_s)}


def handed_over(recorder: Recorder, rows: Rows) -> tuple[float, float]:
    """CPU seconds of the loop and of the recorder's thread for one step; another load on the machine does not count."""
    everything, own = time.process_time(), time.thread_time()
    recorder.step(rows)
    waited = time.thread_time() - own
    recorder.flush()
    return waited, time.process_time() - everything - (time.thread_time() - own)


def large_run(folder: Path) -> dict[str, float]:
    """CPU seconds and bytes of a step of LARGE, with every column there is but texts."""
    rng = np.random.default_rng(0)
    batch, length = LARGE
    lengths = rng.integers(length // 4, length + 1, batch)
    mask = np.arange(length) < lengths[:, None]
    old = -rng.exponential(0.5, mask.shape).astype(np.float32)
    floats = {
        name: (old + rng.normal(0, 0.02, mask.shape)).astype(np.float32)
        for name in ("behaviour_logprob", "reference_logprob", "new_logprob", "old_eos_logprob",
                     "reference_eos_logprob", "entropy")
    }  # fmt: skip
    score = rng.normal(0, 1, batch)
    rows = Rows(
        0,
        mask,
        {"score": score},
        group=np.arange(batch) // 8,
        ended=lengths < length,
        active=rng.random(mask.shape) < 0.9,
        response_ids=rng.integers(0, 150_000, mask.shape),
        old_logprob=old,
        **floats,
    )
    with Recorder(folder, CONVENTIONS) as recorder:
        waited, thread = handed_over(recorder, rows)
    return {
        "waited_s": waited,
        "thread_s": thread,
        "bytes": (folder / "trace" / "step-000000.parquet").stat().st_size,
        "tokens": int(mask.sum()),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tiny, large = tiny_run(Path(folder) / "tiny"), large_run(Path(folder) / "large")
        files = list((Path(folder) / "tiny" / "trace").iterdir())
        tiny["bytes"] = sum(path.stat().st_size for path in files) / len(files)
    result = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tiny": tiny,
        "large": large,
        "seconds": time.monotonic() - began,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "recording.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "recording.md").write_text(render(result), encoding="utf-8")
    print(json.dumps(result))


def render(result: dict[str, Any]) -> str:
    """The page; every number in it comes from `result` or from the constants above."""
    tiny, large = result["tiny"], result["large"]
    full = LARGE[0] * LARGE[1]
    more = full / large["tokens"]  # the measured responses are of unequal length
    per_token = large["bytes"] / large["tokens"]
    shortest = PASSES * PARAMETERS * full / (GPUS * SPEED)
    machine = "{cores} cores, Python {python}, PyTorch {torch} with one thread, no GPU".format(**result)
    flop = f"{PASSES} x 7e9 x {full:,} / ({GPUS} x {SPEED:.0e})"
    waited, thread = large["waited_s"] * more, large["thread_s"] * more
    return f"""# What recording costs

Made by `python benchmarks/recorder_overhead.py`; raw figures in `recording.json`.

{machine}. Times are CPU seconds.

| loop | tokens a step | step without recording, s | recording holds the loop, s | its thread takes, s | MB a step |
|--|--|--|--|--|--|
| tiny recurrent model, {BATCH} x {LENGTH} | {BATCH * LENGTH:,} | {tiny["step_s"]:.3f} | {tiny["waited_s"]:.4f} \
| {tiny["thread_s"]:.3f} | {tiny["bytes"] / 1e6:.2f} |
| arrays of {LARGE[0]} x up to {LARGE[1]}, no model | {large["tokens"]:,} | – | {large["waited_s"]:.4f} \
| {large["thread_s"]:.2f} | {large["bytes"] / 1e6:.1f} |

The loop is held while arrays are checked and copied: **{tiny["waited_s"] / tiny["step_s"]:.2%}** of the tiny run's
step, whose tokens cost next to nothing to sample. Channels and files are made in a thread beside it, on one core; a
loop that is more than four steps ahead of the thread waits for it. Medians over {STEPS} steps.

## A run of 7 billion parameters

{LARGE[0]} responses x {LARGE[1]:,} tokens a step, every column but texts, {per_token:.0f} bytes a token as measured
above with random numbers, which do not compress:

- disk: {full:,} x {per_token:.0f} bytes = {full * per_token / 1e6:.0f} MB a step,
  **{full * per_token * 1000 / 1e9:.0f} GB per 1,000 steps**. `keep` bounds it, and what a trainer does not tell takes
  nothing.
- time: sampling, scoring and one epoch of learning take {PASSES} FLOP a parameter and token. {GPUS} GPUs at
  {SPEED / 1e12:.0f} TFLOP/s each need at least {flop} = {shortest:.0f} s a step.
  The loop is held {waited:.2g} s of that, **{waited / shortest:.2%}**, and one core is busy for {thread:.1f} s. Tensors
  on a GPU have to be copied from it besides.
"""


if __name__ == "__main__":
    main()
