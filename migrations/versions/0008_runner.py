"""The worker that runs the duties while Postgres decides: one row, with its lease and fencing number.

The row is made by the first election. A worker of the version before does not look at it, and goes on working.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "runner",
        sa.Column("only", sa.Boolean, primary_key=True, server_default=sa.text("true")),
        sa.Column("incarnation", sa.Text, nullable=False, comment="who runs the duties while Postgres decides"),
        sa.Column("fence", sa.BigInteger, nullable=False, comment="grows with each new holder"),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False, comment="the lease runs out then"),
        sa.CheckConstraint('"only"', name="runner_one_row"),
    )


def downgrade() -> None:
    op.drop_table("runner")
