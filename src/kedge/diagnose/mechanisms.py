"""The ways in which a policy comes to drift, by number: what happens to the reward, the gradient or the measurement."""

from __future__ import annotations

MECHANISMS: dict[str, str] = {
    "M1": "The reward is large beside β: an answer is favoured until its log-odds have moved by Δscore / β nats.",
    "M2": "KL does not price length: a long answer that the reference finds likely is free.",
    "M3": "KL per token falls while KL per response grows; a monitor or controller of the former sees nothing.",
    "M4": "Others' samples: responses come from another distribution than the policy that learns from them.",
    "M5": "The critic: a wrong value is in every token's advantage, and a right one absorbs a common KL cost.",
    "M6": "Whitening moves the zero of the advantage to the mean over tokens, which long answers set.",
    "M7": "Whitening token rewards with a shift adds a constant per token, which is a reward for length or brevity.",
    "M8": "A loss that divides by the response's length punishes long bad answers too little, and beside a KL in the "
    "loss that shifts where training ends.",
    "M9": "γ or λ below 1: the score at the end hardly reaches the first tokens; with γ < 1 a negative score is better "
    "late.",
    "M10": "The end of a response: not trained, or cut off at the budget and scored as if it were whole.",
    "M11": "Many epochs on one batch: the penalty is frozen while the policy moves, and the clip lets much through.",
    "M12": "The controller of β lags, is saturated, or aims at what cannot be reached.",
    "M13": "A KL estimator without the KL's gradient: k2, k3 or |k| in the reward, k1 or k3 in the loss.",
    "M14": "The reward model has a slope on a feature that its labels had by accident: length, or a style.",
    "M15": "The reward model is asked far from what it was trained on, and one pattern there scores high.",
    "M16": "A few mistaken scores are so large that they make the gradient.",
    "M17": "What was learnt where it was cheap spills over to prompts whose reference is brief.",
    "M18": "The reference is not the one that is meant: moved, stale, or another model.",
    "M19": "The unit of the score changes, and β with it means something else.",
    "M20": "Scoring and training give the same tokens other probabilities: dropout, other kernels, precision.",
    "M21": "A clamp or clip holds terms that should pull.",
    "M22": "The reward model no longer agrees with people on what the policy says now.",
    "M23": "The prompts changed, not the policy: no drift at all.",
    "M24": "A bonus per token, such as entropy in the reward, pays for length.",
    "M25": "Bradley–Terry leaves each prompt's level open; where that goes with length, means over prompts mislead.",
}
