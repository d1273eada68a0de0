"""Limits by key: the tables `job_keys`, `key_rates` and `key_notes`, and the functions that let jobs of a key start."""

from __future__ import annotations

from pathlib import Path

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _run("up")


def downgrade() -> None:
    """Drop the limits. Jobs that only a limit holds back become due."""
    _run("down")


def _run(direction: str) -> None:
    statements = Path(__file__).with_name(f"{revision}_{direction}.sql").read_text(encoding="utf-8")
    # The driver takes a percent sign for a placeholder of a value.
    op.get_bind().exec_driver_sql(statements.replace("%", "%%"))
