"""Supervision: a worker's signs of life for the system that runs it, and the proof of its end."""
