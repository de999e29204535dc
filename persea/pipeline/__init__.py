"""The stages of a run, in order, each skipped when its output is up to date."""
