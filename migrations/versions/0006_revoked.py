"""What is revoked while a worker holds it, and by which stamps a job is found.

Two columns without a default, and two indexes over the few rows that have a value there: a submit without stamps pays
for neither, and a worker of the version before goes on working. (It knows no marks: what it claims it runs.)
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "jobs",
        sa.Column(
            "revoked_at", sa.DateTime(timezone=True), comment="when it was revoked, if it had been admitted"
        ),
    )
    op.add_column("jobs", sa.Column("stamps", JSONB, comment="its stamped headers: {name: [values]}; null: none"))
    op.create_index(
        "jobs_revoked", "jobs", ["id"], postgresql_where=sa.text("revoked_at IS NOT NULL AND finished_at IS NULL")
    )
    op.create_index(
        "jobs_stamps",
        "jobs",
        ["stamps"],
        postgresql_using="gin",
        postgresql_ops={"stamps": "jsonb_path_ops"},
        postgresql_where=sa.text("stamps IS NOT NULL AND finished_at IS NULL"),
    )


def downgrade() -> None:
    op.drop_index("jobs_stamps", "jobs")
    op.drop_index("jobs_revoked", "jobs")
    op.drop_column("jobs", "stamps")
    op.drop_column("jobs", "revoked_at")
