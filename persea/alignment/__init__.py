"""Alignment of two tokenizers: spans, common events, boundary masks, partial tokens."""
