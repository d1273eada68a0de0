"""What survives faults needs: messages set aside, results that wait, and workers that lost sight of the ledger.

Columns are added with defaults, so a worker of the version before goes on working.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "jobs",
        sa.Column(
            "rerun",
            sa.Boolean,
            nullable=False,
            server_default=sa.text("true"),
            comment="false: its first lost attempt ends it",
        ),
    )
    op.add_column(
        "jobs",
        sa.Column("outbox", sa.Text, comment="what its end left to be delivered, see routing.outbox"),
    )
    op.create_index("jobs_committed", "jobs", ["incarnation"], postgresql_where=sa.text("step = 3"))
    op.create_index("jobs_outbox", "jobs", ["id"], postgresql_where=sa.text("outbox IS NOT NULL"))
    op.create_index(
        "jobs_backlog",
        "jobs",
        [sa.text("(- priority)"), "seq"],
        postgresql_where=sa.text("state IN ('accepted', 'waiting')"),
    )
    op.add_column(
        "workers",
        sa.Column(
            "ledger_lost_at", sa.DateTime(timezone=True), comment="since when it cannot reach the ledger; null: it can"
        ),
    )
    # Nobody decides for a while after the authority changed. That the row was made is no change.
    op.execute("UPDATE authority SET changed_at = 'epoch'")
    op.create_table(
        "quarantine",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("raw", sa.LargeBinary, nullable=False, comment="the message as it came, cut at 1 MiB"),
        sa.Column("queue", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("worker", sa.Text, comment="who set it aside"),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")),
    )
    op.create_index("quarantine_seen", "quarantine", ["seen_at"])


def downgrade() -> None:
    op.drop_table("quarantine")
    op.drop_column("workers", "ledger_lost_at")
    op.drop_index("jobs_backlog", "jobs")
    op.drop_index("jobs_outbox", "jobs")
    op.drop_index("jobs_committed", "jobs")
    op.drop_column("jobs", "outbox")
    op.drop_column("jobs", "rerun")
