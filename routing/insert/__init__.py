"""Inserts into the table of jobs: one row, many rows, in the transaction of a caller, a successor."""
