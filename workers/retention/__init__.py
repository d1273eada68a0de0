"""Duties that end what the platform keeps: finished jobs, unique keys, rows of former workers; one file each."""
