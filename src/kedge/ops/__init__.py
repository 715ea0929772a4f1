"""Equations as functions of tensors: no configuration, no files, no state."""
