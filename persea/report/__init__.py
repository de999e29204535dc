"""Lineage, model card, report page, comparison of runs."""
