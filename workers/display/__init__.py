"""Drawings for people in programs and notebooks: progress bars, and tables as HTML."""
