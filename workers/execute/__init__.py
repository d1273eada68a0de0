"""Execution: from a claimed message to the body, inside Celery's consumer and pool."""
