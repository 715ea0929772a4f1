"""Questions that many formats ask in the same words, and the conventions that their answers make."""

from __future__ import annotations

from typing import Any

from kedge.importers import Answers, Question
from kedge.trace.foreign import Conventions

UNKNOWN = {"unknown": "not known; checks that need it say so"}

KL = Question(
    key="kl",
    text="Where was the KL to the reference charged?",
    why="decides whether beta's part of the advantage can be told from the score's",
    choices={
        "reward": "subtracted from the reward of each token",
        "loss": "a term of the loss",
        "none": "nowhere: beta is 0, or no reference was loaded",
        **UNKNOWN,
    },
    default="unknown",
)
KL_ESTIMATOR = Question(
    key="kl_estimator",
    text="Which estimator of the KL?",
    why="k1 in the reward and k2 in the loss have the gradient of the KL; others have another",
    choices={
        "k1": "log pi - log pi_ref",
        "k2": "half its square",
        "k3": "pi_ref / pi - 1 - log(pi_ref / pi)",
        "abs": "its absolute value",
        "full": "exact, over the vocabulary",
        **UNKNOWN,
    },
    default="unknown",
    only_if=("kl", ("reward", "loss")),
)
KL_UNIT = Question(
    key="kl_unit",
    text="In which unit did the trainer log its KL, and set its target?",
    why="0.1 nats per token are 30 nats for a response of 300 tokens",
    choices={
        "per-token": "mean over tokens",
        "per-sequence": "sum over a response",
        **UNKNOWN,
    },
    default="unknown",
    only_if=("kl", ("reward", "loss")),
)
BETA = Question(
    key="beta",
    text="Which coefficient did the KL have?",
    why="the price of a nat; without it no check can say whether it was too low",
    kind="number",
    default="unknown",
    only_if=("kl", ("reward", "loss")),
)
NORMALISATION = Question(
    key="normalisation",
    text="How were scores made into advantages?",
    why="what the recorded advantages are compared with; a difference is shown as a part of its own",
    choices={
        "none": "not at all",
        "group-mean": "minus the mean of the prompt's responses",
        "group-mean-and-deviation": "that, divided by the standard deviation of the prompt's responses",
        "leave-one-out": "minus the mean of the prompt's other responses",
        "batch": "minus the mean of the step, divided by its standard deviation",
        "group-mean-and-batch": "minus the mean of the prompt's responses, then as batch",
        "leave-one-out-and-batch": "minus the mean of the prompt's other responses, then as batch",
        **UNKNOWN,
    },
    default="unknown",
)
SCORE_POSITION = Question(
    key="score_position",
    text="Which position of a response was given the score?",
    why="a discount or a critic makes the place matter",
    choices={
        "last": "its last token",
        "after": "the slot after its last token",
        "token": "scores come per token",
    },
    default="last",
)
GAMMA = Question(
    key="gamma", text="Discount gamma?", why="the advantage is derived with it", kind="number", default="1"
)
LAM = Question(key="lam", text="GAE's lambda?", why="the advantage is derived with it", kind="number", default="1")


def number(answers: Answers, key: str, default: float = float("nan")) -> float:
    """The number that was answered; `default` where it is unknown."""
    given = answers.get(key, "unknown")
    return default if given == "unknown" else float(given)


def conventions_from(answers: Answers, *, trainer: str, **known: Any) -> Conventions:
    """Conventions of the answers to the questions above; `known` is what the format itself says, and has its way."""
    from_answers: dict[str, Any] = {
        key: answers[key].replace("-", " ")
        for key in ("kl", "kl_estimator", "kl_unit", "normalisation", "score_position")
        if key in answers
    }
    from_answers |= {"beta": number(answers, "beta")}
    from_answers |= {key: number(answers, key, 1.0) for key in ("gamma", "lam")}
    return Conventions(trainer=trainer, **(from_answers | known))
