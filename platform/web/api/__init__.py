"""The API below `/api/v1`: its routes, its models, and the stream of events."""
