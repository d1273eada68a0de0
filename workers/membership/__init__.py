"""Being a worker: its name, its lease, its heartbeat, and which store it believes."""
