"""Where finished jobs go: two tables, and the one function that moves rows into them.

A function, and run with its owner's rights, so that no role of the platform needs the right to delete jobs: whoever may
call it can move what is over, and nothing else. It adds tables and an index, so a worker of the version before goes on
working. (While the index is made, which takes a second for each million rows, writers wait.)
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

#: Columns of jobs and of attempts that are kept.
_JOBS = (
    "seq, id, name, state, epoch, attempt, losses, worker, incarnation, priority, request, declared, queue, retries, "
    "nesting, root_id, parent_id, submitted_at, due_at, expires_at, admitted_at, started_at, finished_at, error"
)
_ATTEMPTS = "epoch, attempt, worker, incarnation, admitted_at, started_at, ended_at, outcome, error"


def _of(table: str, columns: str) -> str:
    return ", ".join(f"{table}.{column}" for column in columns.split(", "))


# What is over: the job is in a final state, its worker has said so (step 3: not yet), whoever waits for its result has
# been told, and no attempt of it is open. Two callers at once take different rows. (In PL/pgSQL, which plans for the
# values that it is given: a plan for any number of rows would read all of both tables.)
_FUNCTION = f"""
CREATE FUNCTION archive_finished(keep double precision, most integer) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  moved bigint;
BEGIN
WITH chosen AS MATERIALIZED (
  SELECT j.id FROM jobs j
  WHERE j.finished_at <= now() - make_interval(secs => keep)
    AND j.state IN ('cancelled', 'expired', 'failed', 'lost', 'succeeded') AND j.step <> 3 AND j.outbox IS NULL
    AND NOT EXISTS (SELECT 1 FROM attempts a WHERE a.job_id = j.id AND a.ended_at IS NULL)
  ORDER BY j.finished_at LIMIT most FOR UPDATE OF j SKIP LOCKED
), gone AS (
  DELETE FROM jobs USING chosen WHERE jobs.id = chosen.id
  RETURNING {_of("jobs", _JOBS)}, octet_length(jobs.message) AS message_bytes
), kept AS (
  INSERT INTO jobs_archive ({_JOBS}, message_bytes) SELECT {_JOBS}, message_bytes FROM gone
), tries AS (
  DELETE FROM attempts USING gone WHERE attempts.job_id = gone.id
  RETURNING gone.seq, {_of("attempts", _ATTEMPTS)}
), kept_too AS (
  INSERT INTO attempts_archive (job_seq, {_ATTEMPTS}) SELECT seq, {_ATTEMPTS} FROM tries
)
SELECT count(*) INTO moved FROM gone;
RETURN moved;
END
$$
"""

# Whoever calls it has no say in which tables it means.
_ITS_TABLES = """
DO $$ BEGIN
  EXECUTE format('ALTER FUNCTION archive_finished(double precision, integer) SET search_path = %I, pg_temp',
    current_schema());
END $$
"""


def _time(name: str, nullable: bool = True) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def upgrade() -> None:
    op.create_table(
        "jobs_archive",
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False, comment="order of submission"),
        sa.Column("id", sa.Text, nullable=False, comment="the Celery task id; it may be used again"),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("losses", sa.SmallInteger, nullable=False),
        sa.Column("worker", sa.Text),
        sa.Column("incarnation", sa.Text),
        sa.Column("priority", sa.SmallInteger, nullable=False),
        sa.Column("request", JSONB, nullable=False),
        sa.Column("declared", sa.Boolean, nullable=False),
        sa.Column("queue", sa.Text, nullable=False),
        sa.Column("retries", sa.Integer, nullable=False),
        sa.Column("nesting", sa.Integer, nullable=False),
        sa.Column("root_id", sa.Text),
        sa.Column("parent_id", sa.Text),
        _time("submitted_at", nullable=False),
        _time("due_at"),
        _time("expires_at"),
        _time("admitted_at"),
        _time("started_at"),
        _time("finished_at", nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("message_bytes", sa.Integer, nullable=False, comment="how long the message was"),
        sa.Column("archived_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")),
    )
    op.create_index("jobs_archive_id", "jobs_archive", ["id"])
    op.create_table(
        "attempts_archive",
        sa.Column("job_seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("worker", sa.Text, nullable=False),
        sa.Column("incarnation", sa.Text, nullable=False),
        _time("admitted_at"),
        _time("started_at"),
        _time("ended_at", nullable=False),
        sa.Column("outcome", sa.Text),
        sa.Column("error", sa.Text),
    )
    op.create_index("jobs_finished", "jobs", ["finished_at"], postgresql_where=sa.text("finished_at IS NOT NULL"))
    op.execute(_FUNCTION)
    op.execute(_ITS_TABLES)


def downgrade() -> None:
    op.execute("DROP FUNCTION archive_finished(double precision, integer)")
    op.drop_index("jobs_finished", "jobs")
    op.drop_table("attempts_archive")
    op.drop_table("jobs_archive")
