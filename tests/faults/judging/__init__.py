"""The oracle that judges a run, and its evidence."""
