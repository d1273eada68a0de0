"""The table `infeasible` keeps since when no registered worker could hold a request for which jobs wait."""

from __future__ import annotations

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE infeasible (
          shape TEXT NOT NULL,
          since TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
          seen_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
          PRIMARY KEY (shape)
        );
        COMMENT ON COLUMN infeasible.shape IS 'the request, as in jobs.shape';
        COMMENT ON COLUMN infeasible.since IS 'since when it has been seen without a break';
        COMMENT ON COLUMN infeasible.seen_at IS 'when it was last seen';
        """
    )


def downgrade() -> None:
    op.drop_table("infeasible")
