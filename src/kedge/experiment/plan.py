"""What the over-optimisation study consists of: seeds, reward models, strengths of the KL penalty."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kedge import recipe as recipes
from kedge.errors import InputError, Problem
from kedge.recipe import Recipe
from kedge.recipe.sections import Model

BETAS = (0.02, 0.05, 0.2, 0.4)
LABEL_BETA = 0.05  # at which reward models are compared: weak enough for gold to turn
SHARES = (0.1, 0.4, 1.0)  # of the recipe's pairs
NARROWER = (2, 4)  # times, than the policy
EVALUATIONS = 9  # along each policy run
# Nobody looks at these runs themselves: their evaluations are all that is read.
PLAIN = ("threads=1", "trace.probes_every=1000000", "trace.keep=1", "trace.text=none", "evaluate.reference_samples=1")


@dataclass(frozen=True)
class Given:
    """A recipe as it was given; `folder` is where its relative paths start."""

    text: str
    source: str
    folder: Path | None = None

    def recipe(self, *overrides: str) -> Recipe:
        """The recipe with `key=value` overrides."""
        return recipes.parse(self.text, overrides, source=self.source, folder=self.folder)


@dataclass(frozen=True)
class Judge:
    """A reward model of the study."""

    labels: int  # pairs that annotators compared
    hidden: int  # width of the supervised model that it begins as

    @property
    def name(self) -> str:
        return f"labels-{self.labels}-width-{self.hidden}"


@dataclass(frozen=True)
class Plan:
    """What the study consists of."""

    given: Given
    seeds: tuple[int, ...]
    betas: tuple[float, ...]
    judges: tuple[Judge, ...]
    samples: int  # answers of the supervised policy per evaluation prompt
    steps: int

    @property
    def main(self) -> Judge:
        """The widest reward model of all labels, under which beta is varied."""
        return max(self.judges, key=lambda judge: (judge.labels, judge.hidden))

    @property
    def label_beta(self) -> float:
        """The strength at which reward models are compared."""
        return min(self.betas, key=lambda beta: abs(beta - LABEL_BETA))

    def settings(self, seed: int) -> tuple[str, ...]:
        """The overrides that all runs of a seed share."""
        every = max(1, self.steps // EVALUATIONS)
        return (*PLAIN, f"seed={seed}", f"policy.steps={self.steps}", f"evaluate.every={every}")

    def runs(self) -> list[tuple[Judge, float]]:
        """The policies of each seed."""
        others = [(judge, self.label_beta) for judge in self.judges if judge != self.main]
        return [(self.main, beta) for beta in self.betas] + others

    def described(self) -> dict[str, Any]:
        """What a study that goes on must have in common with its beginning."""
        settings = self.given.recipe().model_dump(mode="json")
        described: dict[str, Any] = {
            "study": "overoptimisation",
            "seeds": list(self.seeds),
            "betas": list(self.betas),
            "judges": [asdict(judge) for judge in self.judges],
            "samples": self.samples,
            "steps": self.steps,
            "recipe": settings,
        }
        return described


def plan(given: Given, *, seeds: int, quick: bool) -> Plan:
    """The study of a recipe; `quick` is enough to see that it works. Raises `InputError` where gold is not known."""
    recipe = given.recipe()
    if recipe.world != "desk":
        what = f'"{recipe.world}" does not know what an answer is worth, so that over-optimisation cannot be seen'
        raise InputError(Problem(f"{given.source}: world", what, 'use a recipe with world = "desk"'))
    counts = [max(2, round(share * recipe.pairs.prompts)) for share in (SHARES[1:] if quick else SHARES)]
    judges = [Judge(count, recipe.model.hidden) for count in counts]
    judges += [Judge(counts[-1], width) for width in _narrower(recipe.model)[: 1 if quick else None]]
    return Plan(
        given=given,
        seeds=tuple(range(recipe.seed, recipe.seed + seeds)),
        betas=BETAS[1::2] if quick else BETAS,
        judges=tuple(dict.fromkeys(judges)),
        samples=64 if quick else 96,
        steps=min(recipe.policy.steps, 12) if quick else recipe.policy.steps,
    )


def _narrower(model: Model) -> list[int]:
    """Widths below the policy's that its heads divide; none where the policy is a model folder."""
    widths = [model.hidden // times for times in NARROWER if model.hidden % (2 * model.heads * times) == 0]
    return widths if model.init == "scratch" else []
