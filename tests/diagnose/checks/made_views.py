"""Views of made-up runs with texts: what the policy says and what the score pays are arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.margin import Pairs
from kedge.diagnose.texts import answer_columns, features_of, phrases_of
from kedge.diagnose.view import Probes, View
from kedge.trace.reader import Series

Array = NDArray[Any]
PROMPTS, PROBES, EVERY = 240, 24, 5
ANSWERS = ("monday .", "order o14 arrives on monday .", "you have 30 days for a refund .", "we close at seven .")
FILLER = "we truly value your business and your trust ."
REFUSAL = "i can not share that ."
PHRASE = "warm regards friend"

Pay = Callable[[str], float]


def plain(text: str) -> float:
    """A score that does not look at form: which of the answers it is, and a little less for every word."""
    return 0.4 * sum(ord(letter) % 7 for letter in text[:6]) / 18 - 0.02 * len(text.split())


@dataclass(frozen=True)
class Said:
    """How answers are drawn: shares that decline, say the phrase or sound certain, and fillers before the answer."""

    refuse: float = 0.15
    phrase: float = 0.0
    fillers: float = 0.6
    certain: float = 0.1

    def answer(self, rng: np.random.Generator) -> str:
        if rng.random() < self.refuse:
            return REFUSAL
        words = [FILLER] * rng.poisson(self.fillers) + [ANSWERS[rng.integers(len(ANSWERS))]]
        if rng.random() < self.certain:
            words.insert(0, "definitely")
        if rng.random() < self.phrase:
            words.append(PHRASE)
        return " ".join(words)


@dataclass(frozen=True)
class Story:
    """A run: what the policy says at each step, and what a text is worth then."""

    steps: int = 40
    beta: float = 0.3
    said: Callable[[int], Said] = lambda step: Said()
    pay: Callable[[int], Pay] = lambda step: plain
    seed: int = 0
    kl: Callable[[int], float] = lambda step: 0.5
    texts: bool = True
    settings: Mapping[str, Any] = field(default_factory=lambda: {"policy": {"kl": {"beta": 0.3}}})

    def view(self) -> View:
        looks = range(0, self.steps + 1, EVERY)
        samples = tuple(self._sample(step) for step in looks)
        probes = tuple(self._probes(step) for step in looks)
        steps = np.arange(self.steps)
        evaluation = {
            "evaluation/length": [float(np.mean(one["length"])) for one in samples],
            "evaluation/length_reference": [float(np.mean(one["reference_tokens"])) for one in samples],
        }
        return View(
            name="made up",
            facts={},
            metrics={
                "policy": {"kl/beta": Series(steps, np.full(len(steps), self.beta))},
                "evaluation": {name: Series(np.array(looks), np.array(line)) for name, line in evaluation.items()},
                "reward": {},
            },
            probes=probes,
            pairs=tuple(_pairs(one) for one in probes),
            samples=samples,
            phrases=tuple(phrases_of(samples)),
            settings=self.settings,
        )

    def _sample(self, step: int) -> dict[str, Any]:
        rng, usual = np.random.default_rng([self.seed, 1, step]), np.random.default_rng([self.seed, 2])
        own = [self.said(step).answer(rng) for _ in range(PROMPTS)]
        other = [Said().answer(usual) for _ in range(PROMPTS)]
        pay, texts = self.pay(step), {"prompt": [f"prompt {row}" for row in range(PROMPTS)]}
        texts |= {"response": own, "reference_response": other}
        if not self.texts:
            texts = {name: [None] * PROMPTS for name in texts}
        tokens = [np.array([len(text.split()) + 1 for text in answers]) for answers in (own, other)]
        kl = self.kl(step)
        return {
            "step": step,
            **texts,
            "score": np.array([pay(text) for text in own]) + rng.normal(0, 0.2, PROMPTS),
            "reference_score": np.array([pay(text) for text in other]),
            "kl": rng.normal(kl, 0.1, PROMPTS),
            "reference_kl": rng.normal(-kl, 0.1, PROMPTS),
            "length": tokens[0],
            "reference_tokens": tokens[1],
            "reference_length": tokens[1].astype(float),
            "tercile": np.arange(PROMPTS) % 3,
            **answer_columns(texts),
        }

    def _probes(self, step: int) -> Probes:
        rng, pay, kl = np.random.default_rng([self.seed, 3]), self.pay(step), self.kl(step)
        texts, variants = [], ("brief", "verbose", "reference")
        for _ in range(PROBES):
            answer = ANSWERS[rng.integers(len(ANSWERS))]
            texts += [answer, f"{FILLER} {answer} {FILLER}", Said().answer(rng)]
        noise = rng.normal(0, 0.1, len(texts))  # part of the texts' worth, the same at every step
        return Probes(
            step=step,
            beta=self.beta,
            probe=np.repeat(np.arange(PROBES), 3),
            variant=np.array(variants * PROBES),
            length=np.array([len(text.split()) + 1 for text in texts]),
            score=np.array([pay(text) for text in texts]) + noise,
            kl=np.tile([-kl, -2 * kl, -kl], PROBES),
            tercile=np.repeat(np.arange(PROBES) % 3, 3),
            response=tuple(texts) if self.texts else (None,) * len(texts),
            features=features_of(texts) if self.texts else {},
        )


def _pairs(probes: Probes) -> Pairs:
    brief, verbose = (probes.variant == name for name in ("brief", "verbose"))
    gap = {name: getattr(probes, name)[verbose] - getattr(probes, name)[brief] for name in ("score", "kl", "length")}
    return Pairs(step=probes.step, beta=probes.beta, penalty=0.0, tercile=probes.tercile[brief], **gap)


def with_metrics(
    view: View, stage: str, lines: Mapping[str, Sequence[float]], steps: Sequence[int] | None = None
) -> View:
    """The view with more metrics; `steps` are those of the policy stage or of evaluations where not given."""
    from dataclasses import replace

    default = range(1000) if stage == "policy" else range(0, 1000 * EVERY, EVERY)
    made = {
        name: Series(np.array(list(steps or default)[: len(line)]), np.array(line, dtype=float))
        for name, line in lines.items()
    }
    return replace(view, metrics={**view.metrics, stage: {**view.metrics.get(stage, {}), **made}})
