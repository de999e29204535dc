"""Two tokenizers over the same bytes: spans, common events, boundary masks, partial tokens."""
