"""Submission: from `apply_async` to the durable row."""
