"""A module that makes its worker one of the next release, whose messages have a newer format."""

from __future__ import annotations

from celery_capacity.routing import format_versions

format_versions.MESSAGE += 1  # type: ignore[misc]
