"""Faults put into training runs on purpose, the runs that have them, and how well the diagnosis finds them."""
