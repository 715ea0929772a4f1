"""The same answers among sentences that say nothing, to learn what length alone is worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kedge.data.records import Preference

MOST = 3  # sentences around an answer
PLAIN_WINS = 0.75  # three readers in four would rather have the answer without them


def padded(text: str, sentences: Sequence[str], count: int, rng: np.random.Generator) -> str:
    """`text` among `count` different sentences, or among all of them where there are fewer.

    A coin puts each in front or behind: a reward model that is only shown padding behind still pays for it in front.
    """
    chosen = rng.choice(len(sentences), size=min(count, len(sentences)), replace=False)
    front = rng.random(len(chosen)) < 0.5
    before = [sentences[index] for index in chosen[front]]
    return " ".join([*before, text, *(sentences[index] for index in chosen[~front])])


def padded_pairs(pairs: Sequence[Preference], sentences: Sequence[str], rng: np.random.Generator) -> list[Preference]:
    """For each pair one of its responses against the same among one to three sentences, which most would not choose."""
    plain = []
    for pair in pairs:
        text = pair.chosen if rng.random() < 0.5 else pair.rejected
        longer = padded(text, sentences, int(rng.integers(1, MOST + 1)), rng)
        plain.append(Preference(pair.prompt, text, longer, strength=PLAIN_WINS))
    return plain
