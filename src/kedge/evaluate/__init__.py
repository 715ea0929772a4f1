"""How good a policy is: scores, divergence and capability on held-out prompts."""
