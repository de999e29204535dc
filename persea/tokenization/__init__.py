"""Tokenizers as bytes: their vocabularies, how they build tokens, and where they split text."""
