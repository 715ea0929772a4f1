"""Reports for people: self-contained HTML from a run folder. Imports no torch."""
