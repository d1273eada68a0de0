"""What one process holds: its stores, its name, its allocations; forks, exit codes, waits."""
