"""What a replaced job waits for: each step of its replacement says whose it is. And what a successor is called, and
whether it may run again.

It adds columns, and an index of the rows that have it, which none has yet: it is made at once, and a worker of the
version before goes on working (it refuses replacements by more than one task).
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("replaces", sa.Text, comment="the job in whose replacement this is a step"))
    op.add_column("jobs", sa.Column("successor_name", sa.Text))
    op.add_column("jobs", sa.Column("successor_rerun", sa.Boolean))
    op.create_index("jobs_replaces", "jobs", ["replaces"], postgresql_where=sa.text("replaces IS NOT NULL"))


def downgrade() -> None:
    op.drop_index("jobs_replaces", "jobs")
    op.drop_column("jobs", "successor_rerun")
    op.drop_column("jobs", "successor_name")
    op.drop_column("jobs", "replaces")
