"""Decisions about all workers while Postgres decides, since each worker that pulls knows only itself."""
