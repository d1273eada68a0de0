"""Faults of every kind, and the one oracle that judges them. `python -m tests.faults.chaos` breaks at random."""
