"""The labels that workers publish."""

from __future__ import annotations

from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        ALTER TABLE workers ADD COLUMN labels JSONB NOT NULL DEFAULT '{}';
        COMMENT ON COLUMN workers.labels IS 'its labels, value by key, as it published them';
        """
    )


def downgrade() -> None:
    op.drop_column("workers", "labels")
