"""How good a reward is, whatever gives it: against people, against length, and against padding."""
