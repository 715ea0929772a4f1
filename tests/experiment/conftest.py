"""A tiny run of the built-in desk with all its checkpoints, made once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "pipeline"))


@contextmanager
def shrunk() -> Iterator[None]:
    import kedge.desk.world as world
    import kedge.pipeline.tasks as tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "DESK_PROMPTS", 64)
        patch.setattr(world, "HELD_OUT", 16)
        yield


@pytest.fixture(scope="module")
def small_desk() -> Iterator[None]:
    """Fewer texts in the built-in desk than any recipe can ask for, in this module alone."""
    with shrunk():
        yield


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five policy steps with an adaptive beta; checkpoints after steps 2, 4 and 5."""
    from processes import RECIPE

    from kedge import pipeline
    from kedge import recipe as recipes
    from kedge.progress import Interrupt, Progress

    text = RECIPE.replace("[checkpoint]", "[checkpoint]\nkeep = 9")
    run = tmp_path_factory.mktemp("source") / "drift"
    stages = ("sft", "reward", "policy")
    with shrunk():
        pipeline.run(recipes.parse(text), run, recipe_text=text, stages=stages, resume=False,
                     progress=Progress(quiet=True), interrupt=Interrupt())  # fmt: skip
    return run
