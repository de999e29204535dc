"""Executors: where units of work run, and the ledger of what every attempt cost."""
