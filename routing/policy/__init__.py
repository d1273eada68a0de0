"""Placement of jobs on workers: pure decisions over plain values."""
