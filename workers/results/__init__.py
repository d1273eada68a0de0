"""Outcomes of attempts on their way: results, chord parts, events, rows."""
