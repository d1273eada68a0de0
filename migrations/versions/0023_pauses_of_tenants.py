"""Pauses of tenants."""

from __future__ import annotations

from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        ALTER TABLE pauses DROP CONSTRAINT pauses_kind_known;
        ALTER TABLE pauses ADD CONSTRAINT pauses_kind_known CHECK (kind IN ('platform', 'queue', 'task', 'tenant'));
        COMMENT ON COLUMN pauses.name IS 'of the queue, the task or the tenant; empty for the platform';
        """
    )


def downgrade() -> None:
    op.execute(
        """
        DELETE FROM pauses WHERE kind = 'tenant';
        ALTER TABLE pauses DROP CONSTRAINT pauses_kind_known;
        ALTER TABLE pauses ADD CONSTRAINT pauses_kind_known CHECK (kind IN ('platform', 'queue', 'task'));
        COMMENT ON COLUMN pauses.name IS 'of the queue or the task; empty for the platform';
        """
    )
