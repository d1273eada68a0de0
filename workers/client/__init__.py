"""What a program sees of its jobs: their events, and the block that commits with their end."""
