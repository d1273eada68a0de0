"""When the process that opens an epoch of the ledger said last that it goes on.

A column without a default, in one row: no lock that anybody waits for.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "authority",
        sa.Column("opening_at", sa.DateTime(timezone=True), comment="its opener's last word; null: nobody opens it"),
    )


def downgrade() -> None:
    op.drop_column("authority", "opening_at")
