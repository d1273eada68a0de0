"""From `apply_async` to the durable row."""
