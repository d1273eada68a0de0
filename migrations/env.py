"""Alembic's environment, run for every command: it works on the connection that `migrations` hands over.

That connection is in a transaction that `migrations` opened and commits. This script begins and ends none.
"""

from __future__ import annotations

from alembic import context

from celery_capacity.routing.database.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    compare_type=True,
    compare_server_default=True,
)
context.run_migrations()
