"""Ours beside other systems: `python -m benchmarks.peers` (or `make bench-peers`).

programs     a program for each peer; it runs in an environment of its own and imports nothing of ours
environment  that environment, in build/peers
__main__     rounds of ours and of all peers in turn, and the table
"""
