"""`kedge verify`: every optimiser against the closed form that it must reach, on spaces small enough to list."""
