"""The table `retries` links a job to the job that it repeats, and `jobs.progress` keeps how far an attempt has come."""

from __future__ import annotations

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE retries (
          seq BIGINT NOT NULL,
          job TEXT NOT NULL,
          of_seq BIGINT NOT NULL,
          of_job TEXT NOT NULL,
          made_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
          PRIMARY KEY (seq)
        );
        CREATE INDEX retries_of ON retries (of_seq);
        COMMENT ON COLUMN retries.seq IS 'jobs.seq of the new job';
        COMMENT ON COLUMN retries.job IS 'the new job';
        COMMENT ON COLUMN retries.of_seq IS 'jobs.seq of the job that it repeats';
        COMMENT ON COLUMN retries.of_job IS 'the job that it repeats';
        ALTER TABLE jobs ADD COLUMN progress JSONB;
        COMMENT ON COLUMN jobs.progress IS
          'how far an attempt has come: {epoch, attempt, current, total, message, at}';
        """
    )


def downgrade() -> None:
    op.drop_column("jobs", "progress")
    op.drop_table("retries")
