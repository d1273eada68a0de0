"""The archive is partitioned by month, so that whole months can be dropped.

The present tables become the partitions of the month in which this revision is applied, with all rows before it. No row
is rewritten; the primary keys are built anew, since they must have the time in them.
"""

from __future__ import annotations

from pathlib import Path

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _run("up")


def downgrade() -> None:
    """Move the rows of all months into plain tables again."""
    _run("down")


def _run(direction: str) -> None:
    statements = Path(__file__).with_name(f"{revision}_{direction}.sql").read_text(encoding="utf-8")
    # The driver takes a percent sign for a placeholder of a value.
    op.get_bind().exec_driver_sql(statements.replace("%", "%%"))
