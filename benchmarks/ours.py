"""Our side, as a user gets it: `create_app()`, with the servers named in the environment."""

from __future__ import annotations

from celery import Celery

import celery_capacity


def create() -> Celery:
    """Return the application of a process that submits to `celery -A platform worker`."""
    app: Celery = celery_capacity.create_app(include=["benchmarks.tasks"])
    return app
