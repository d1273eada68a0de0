"""State of one process: its stores, name and allocations; forks, exit codes, waits."""
