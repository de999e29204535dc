"""Measure models on tasks: compatibility check, audition, evaluation."""
