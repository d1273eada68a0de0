"""Steps by which a Celery app becomes an app of the platform, and its remote control."""
