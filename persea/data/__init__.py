"""Prompts and texts: reading, deduplication, language identification."""
