"""Alembic's environment, run for every command: it works on the connection that `migrations` hands over.

That connection is in a transaction that `migrations` opened and commits. This script begins and ends none.
"""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
