"""Experiments: checks and studies that carry out many runs and compare what they came to."""
