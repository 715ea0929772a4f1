"""Recorders for other people's trainers: a subclass or a wrapper that writes a full trace and changes nothing else.

No recorder imports the trainer it records, nor anything of `kedge.train`.
"""
