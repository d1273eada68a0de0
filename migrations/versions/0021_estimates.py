"""The table `estimates`: some estimated starts of waiting jobs, and when the jobs started."""

from __future__ import annotations

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE estimates (
          job TEXT NOT NULL,
          made_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
          starts_at TIMESTAMP WITH TIME ZONE NOT NULL,
          started_at TIMESTAMP WITH TIME ZONE,
          PRIMARY KEY (job)
        );
        COMMENT ON COLUMN estimates.starts_at IS 'the estimated start';
        COMMENT ON COLUMN estimates.started_at IS 'the first start after the estimate; null: the job waits';
        """
    )


def downgrade() -> None:
    op.drop_table("estimates")
