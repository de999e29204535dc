"""Teachers: a model with its chat renderer, run by one of several engines."""
