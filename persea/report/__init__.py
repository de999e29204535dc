"""The report of a run: an HTML page, a model card and report.json, computed from the run's
files.
"""
