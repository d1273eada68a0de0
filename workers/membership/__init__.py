"""Membership of a worker: its name, lease and heartbeat, and the store that it believes."""
