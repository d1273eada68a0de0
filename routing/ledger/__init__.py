"""The ledger in Redis: its connection, scripts, keys, and typed replies."""
