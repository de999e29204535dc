"""Run untrusted code in isolation, or refuse."""
