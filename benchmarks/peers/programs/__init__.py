"""A program for each peer. It prints a JSON object, figure to value, and imports nothing but the peer.

Figures have the names and units of ours. `work.json` in the working folder says what to run.
"""
