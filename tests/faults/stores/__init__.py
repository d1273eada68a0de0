"""Stores that die, stall, or come back empty."""
