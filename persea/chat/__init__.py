"""Conversations, chat templates, model families, and the renderers that turn a conversation into token ids."""
