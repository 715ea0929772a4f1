"""Judgements that are functions of the trace alone. Imports no torch and never reads what a built-in world knows."""
