"""Conversations, chat templates and the renderers that turn one into token ids."""
