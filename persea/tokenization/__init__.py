"""Vocabularies as bytes, and how tokenizers build their tokens."""
