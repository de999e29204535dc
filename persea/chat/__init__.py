"""Conversations, chat templates, model families, and renderers from conversations to token ids."""
