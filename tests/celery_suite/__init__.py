"""Celery's own integration suite, with plain Celery and with apps of the platform: `make test-celery`."""
