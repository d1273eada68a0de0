"""The time that a job is expected to run, the times that tasks took, and the end of a worker."""

from __future__ import annotations

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        ALTER TABLE jobs ADD COLUMN expected_ms BIGINT NOT NULL DEFAULT 0, ADD COLUMN successor_expected_ms BIGINT;
        COMMENT ON COLUMN jobs.expected_ms IS
          'milliseconds that the job is expected to run: declared, learned or its time limit; 0: unknown';
        ALTER TABLE workers ADD COLUMN ends_at TIMESTAMP WITH TIME ZONE;
        COMMENT ON COLUMN workers.ends_at IS 'end of its life, as it published it; null: no end is known';
        CREATE TABLE run_times (
          task TEXT NOT NULL,
          request TEXT NOT NULL,
          expected_ms BIGINT NOT NULL,
          spread_ms BIGINT NOT NULL,
          count BIGINT NOT NULL,
          weights JSONB NOT NULL,
          updated_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
          PRIMARY KEY (task, request)
        );
        CREATE TABLE run_times_read (
          "only" BOOLEAN DEFAULT true NOT NULL,
          read_until TIMESTAMP WITH TIME ZONE NOT NULL,
          PRIMARY KEY ("only"),
          CONSTRAINT run_times_read_one_row CHECK ("only")
        );
        COMMENT ON COLUMN run_times.request IS 'shape of the jobs, without their run time';
        COMMENT ON COLUMN run_times.expected_ms IS 'milliseconds that four of five of them run at most; 0: too few';
        COMMENT ON COLUMN run_times.weights IS 'decayed numbers of runs, by the class of their time';
        COMMENT ON COLUMN run_times_read.read_until IS 'jobs that ended until then were read';
        INSERT INTO run_times_read (read_until) SELECT now() - interval '1 day';
        """
    )


def downgrade() -> None:
    op.drop_table("run_times_read")
    op.drop_table("run_times")
    op.drop_column("workers", "ends_at")
    op.drop_column("jobs", "successor_expected_ms")
    op.drop_column("jobs", "expected_ms")
