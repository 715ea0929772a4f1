"""Kedge: reinforcement learning from human feedback that shows what moved the policy."""

__version__ = "0.1.0"
