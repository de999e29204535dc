"""Run untrusted code in isolation, or refuse to run it."""
