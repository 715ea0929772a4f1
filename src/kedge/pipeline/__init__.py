"""Recipes carried out: the stages of a run, each resumable, and the demo's story in two acts."""

from kedge.pipeline.demo import demo
from kedge.pipeline.run import STAGES, run
from kedge.pipeline.summary import lines

__all__ = ["STAGES", "demo", "lines", "run"]
