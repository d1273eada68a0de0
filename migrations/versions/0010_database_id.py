"""An id of the database, which the ledger notes: two databases on one Redis number are told apart.

It has a default, so that a worker of the version before, which knows nothing of it, goes on working.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "authority",
        sa.Column(
            "database_id",
            sa.Text,
            nullable=False,
            server_default=sa.text("gen_random_uuid()"),
            comment="tells this database from others; the ledger notes whose books it has",
        ),
    )


def downgrade() -> None:
    op.drop_column("authority", "database_id")
