"""Repairs of the steps that a crash left undone: one file, one function, one pass. Safe to run twice at once."""
