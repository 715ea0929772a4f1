"""Supervised fine-tuning, reward modelling and policy optimisation, one loop each."""
