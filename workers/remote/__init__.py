"""Celery's remote control of a worker."""
