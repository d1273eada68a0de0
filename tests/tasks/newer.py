"""Let the worker that imports this be of the next release, whose messages have a newer format."""

from __future__ import annotations

from celery_capacity.routing.model import format_versions

format_versions.MESSAGE += 1  # type: ignore[misc]
