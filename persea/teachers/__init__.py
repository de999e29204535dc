"""Teachers: a chat renderer on an engine."""
