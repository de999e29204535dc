"""Licences of models and data: what they allow a student to be, and what it then owes."""
