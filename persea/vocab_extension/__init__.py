"""Extend a vocabulary with merged tokens and resize the model."""
