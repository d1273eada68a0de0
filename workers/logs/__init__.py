"""Logs of processes and of jobs: lines in JSON, and the lines of a job's own that are kept for people."""
