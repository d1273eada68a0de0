"""What breaks, and the one oracle that says what came of it. `python -m tests.faults.chaos` breaks at random."""
