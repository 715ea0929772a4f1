"""Held-out text that people wrote has become much less likely: language or knowledge is lost.

**What.** The policy's likeliest next token on held-out text is right less often than at the start; where only the loss
is known, the loss rose.

**Why it matters.** What reinforcement learning does not ask for is paid for with what supervised training taught.

**How.** `evaluation/anchor_accuracy` at the first evaluation minus the mean of two evaluations in a row; it fails at
0.04. Without it, `evaluation/anchor_loss` over its start; it fails at 1.6. The loss rises in healthy runs, too, as the
policy settles on one way to say things, by up to 1.3 in small ones; the accuracy hardly moves.

**False alarms.** Held-out text in a style that the policy is meant to leave.

**Remedy.** A pretraining mix, a larger β, fewer steps.

**References.** Ouyang et al. 2022 (alignment tax, PPO-ptx).
"""

from __future__ import annotations

from kedge.diagnose.behaviour import STRONGEST, firmer, smooth
from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.steps import first_where
from kedge.diagnose.view import View
from kedge.trace.reader import Series

LOST = 0.04  # of all tokens
WORSE = 1.6  # times the loss at the start


def judge(view: View) -> Finding:
    """The largest loss of accuracy, or rise of the loss."""
    accuracy, loss = (view.metric(f"evaluation/anchor_{name}", "evaluation") for name in ("accuracy", "loss"))
    if accuracy is not None and len(accuracy.values) > 1:
        name, unit, where = "accuracy lost on held-out text", "share of tokens", "evaluation/anchor_accuracy"
        lost, limit = Series(accuracy.steps, accuracy.values[0] - smooth(accuracy).values), LOST
    elif loss is not None and len(loss.values) > 1 and loss.values[0] > 0:
        name, unit, where = "rise of the loss on held-out text", "times the start", "evaluation/anchor_loss"
        lost, limit = Series(loss.steps, smooth(loss).values / loss.values[0] - 1), WORSE - 1
    else:
        return not_checked("capability", "no two evaluations measured held-out text (evaluation/anchor_loss)")
    evidence = [Evidence(name, float(lost.values.max()), unit, f"largest; fails from {limit:g}", where)]
    if loss is not None and loss.values[0] > 0:
        evidence.append(Evidence("loss over its start", float(loss.values[-1] / loss.values[0]), "1", "last", where))
    finding = Finding(
        "capability",
        "ok",
        f"Held-out text: {name} {lost.values[-1]:.2g} at the end.",
        evidence=tuple(evidence),
        onset=first_where(lost, lost.values >= limit),
        mechanism="The policy has moved away from what the supervised model knew, unasked by the reward.",
        refuted_by="tasks that are not trained on are solved as well as before",
        remedies=(
            Remedy(
                ("policy.pretraining_mix=0.5",),
                "adds half of the demonstrations' log-likelihood to the loss of every step",
                "slower gain in score",
            ),
            firmer(view),
        ),
    )
    return graded(finding, max(0.0, min(STRONGEST, float(lost.values.max()) / limit)))


CHECK = Check("capability", "held-out text is lost", Kind.SYMPTOM, (), judge, needs=("evaluations",))
