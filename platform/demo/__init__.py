"""The replay of a trace of jobs, and its figures."""
