"""Access of a program to its jobs: their events, and the block that commits with their end."""
