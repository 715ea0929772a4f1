"""Demonstrations, preferences and prompts: read, checked, split and turned into token ids."""
