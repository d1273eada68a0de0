"""The table `reservations`: the workers that are reserved for blocked jobs while Postgres decides."""

from __future__ import annotations

from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE reservations (
          worker TEXT NOT NULL,
          epoch BIGINT NOT NULL,
          job TEXT NOT NULL,
          starts_at TIMESTAMP WITH TIME ZONE,
          kept_since TIMESTAMP WITH TIME ZONE,
          beside JSONB NOT NULL,
          refused BOOLEAN DEFAULT false NOT NULL,
          made_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
          PRIMARY KEY (worker)
        );
        COMMENT ON COLUMN reservations.epoch IS 'the epoch in which it was made: in any other one it is void';
        COMMENT ON COLUMN reservations.job IS 'the blocked job; once that no longer waits, the reservation is void';
        COMMENT ON COLUMN reservations.starts_at IS
          'when the job is expected to start there; null: the worker is kept until it does';
        COMMENT ON COLUMN reservations.kept_since IS 'since when the worker is kept; null: it is not';
        COMMENT ON COLUMN reservations.beside IS
          'amounts that later jobs may hold there at that time, in millicores, bytes and pieces';
        COMMENT ON COLUMN reservations.refused IS 'the worker can never hold the job, and ignores the reservation';
        COMMENT ON COLUMN reservations.made_at IS 'when the runner of the duties wrote it';
        """
    )


def downgrade() -> None:
    op.drop_table("reservations")
