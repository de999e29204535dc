"""The teacher cache: captured answers and sparse distributions on disk."""
