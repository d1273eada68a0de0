"""The commands that act on jobs: `submit`, `wait`, `cancel` and `retry`, and what they share."""
