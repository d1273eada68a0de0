"""Commands that watch a cluster in a terminal: its workers, its backlog, its tasks, and events as they come."""
