"""What the over-optimisation study consists of: seeds, reward models, strengths of the KL penalty."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kedge import recipe as recipes
from kedge.errors import InputError, Problem
from kedge.recipe import Recipe

BETAS = (0.02, 0.05, 0.1, 0.2, 0.4)
LABEL_BETA = 0.05  # at which reward models are compared: weak enough for gold to turn
SHARES = (0.1, 0.4, 1.0)  # of the recipe's pairs
MEMBERS = 3
MEMBERS_SHARE = 0.4
EVALUATIONS = 18  # along each policy run
# Nobody looks at these runs themselves: their evaluations are all that is read.
PLAIN = ("threads=1", "trace.probes_every=1000000", "trace.keep=1", "trace.text=none")


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
    members: int

    @property
    def name(self) -> str:
        return f"labels-{self.labels}" + (f"-members-{self.members}" if self.members > 1 else "")

    def settings(self) -> tuple[str, ...]:
        """The overrides that make it."""
        return f"pairs.prompts={self.labels}", f"reward.members={self.members}"


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
        """The reward model with all labels and one member, under which beta is varied."""
        return max((judge for judge in self.judges if judge.members == 1), key=lambda judge: judge.labels)

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
    judges = [Judge(count, 1) for count in counts]
    if not quick:
        judges.append(Judge(max(2, round(MEMBERS_SHARE * recipe.pairs.prompts)), MEMBERS))
    return Plan(
        given=given,
        seeds=tuple(range(recipe.seed, recipe.seed + seeds)),
        betas=BETAS[1::2] if quick else BETAS,
        judges=tuple(dict.fromkeys(judges)),
        samples=64 if quick else 96,
        steps=min(recipe.policy.steps, 12) if quick else recipe.policy.steps,
    )
