"""Ageing: how far the steps of priority are given, and the index of waiting jobs that were due at a time."""

from __future__ import annotations

from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE ageing (
          step SMALLINT PRIMARY KEY,
          seconds DOUBLE PRECISION NOT NULL,
          since TIMESTAMP WITH TIME ZONE NOT NULL,
          seq BIGINT NOT NULL DEFAULT 0,
          due_at TIMESTAMP WITH TIME ZONE NOT NULL DEFAULT 'epoch'
        );
        COMMENT ON COLUMN ageing.step IS 'number of a step of priority that a job gains, the first is 1';
        COMMENT ON COLUMN ageing.seconds IS 'PLATFORM_AGEING; with another value the rows are made anew';
        COMMENT ON COLUMN ageing.since IS 'when ageing began: what waited before counts from here';
        COMMENT ON COLUMN ageing.seq IS 'jobs up to this number of submission have the step';
        COMMENT ON COLUMN ageing.due_at IS 'jobs that were due up to this time have the step';
        CREATE TABLE ageing_marks (at TIMESTAMP WITH TIME ZONE PRIMARY KEY, seq BIGINT NOT NULL);
        COMMENT ON COLUMN ageing_marks.seq IS 'jobs with larger numbers were submitted after this time';
        CREATE INDEX jobs_were_due ON jobs (due_at) WHERE due_at IS NOT NULL AND state IN ('accepted', 'waiting');
        COMMENT ON COLUMN jobs.reprioritized IS 'an operator, or its age, set its priority, which its retries keep';
        """
    )


def downgrade() -> None:
    op.execute(
        """
        DROP INDEX jobs_were_due;
        DROP TABLE ageing_marks;
        DROP TABLE ageing;
        COMMENT ON COLUMN jobs.reprioritized IS 'an operator set its priority, which its retries keep';
        """
    )
