"""Claims and ends, settled with the store that decides."""
