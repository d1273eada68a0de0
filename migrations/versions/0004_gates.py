"""What a job can wait for beside its time and a worker: other jobs, the rate of its task, and an equal job before it.

What a submitter needs of it is in functions, run with their owner's rights, so that whoever only adds jobs can hold one
back without the right to change any. Columns are added with defaults, and a job behind a gate is `scheduled` without a
time, which nobody starts, so a worker of the version before goes on working.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

#: A row is let go by its rate and has not started: it waits for a worker, and counts against its rate.
_LET_GO = (
    "rated AND (state IN ('accepted', 'waiting', 'admitted') OR (state = 'scheduled' AND due_at IS NOT NULL))"
)
#: A row that waits for its rate alone.
_HELD = "rated AND state = 'scheduled' AND due_at IS NULL AND needs = 0"

# Each statement of it sees what was committed before that statement. (In one statement the holder's row, committed
# while the key was waited for, would not be seen.)
_CLAIM = """
CREATE FUNCTION claim_key(wanted text, by_job text, seconds double precision) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  held unique_keys%ROWTYPE;
  ends timestamptz := CASE WHEN seconds > 0 THEN clock_timestamp() + make_interval(secs => seconds) END;
BEGIN
  LOOP
    INSERT INTO unique_keys (key, job, until) VALUES (wanted, by_job, ends) ON CONFLICT (key) DO NOTHING;
    IF FOUND THEN
      RETURN by_job;
    END IF;
    SELECT * INTO held FROM unique_keys WHERE key = wanted FOR UPDATE;
    -- (Where it is gone by now, it is free.)
    IF FOUND THEN
      IF held.job = by_job OR held.until > clock_timestamp()
        OR EXISTS (SELECT 1 FROM jobs WHERE id = held.job AND finished_at IS NULL) THEN
        RETURN held.job;
      END IF;
      UPDATE unique_keys SET job = by_job, until = ends, claimed_at = clock_timestamp() WHERE key = wanted;
      RETURN by_job;
    END IF;
  END LOOP;
END
$$
"""

# Of a row that the caller has just inserted: one that was committed has a time, or a gate already. The jobs that are
# needed are locked in the order of their ids, as all do who lock several, until the row is committed: one that ends
# meanwhile waits, and then knows that it is awaited.
_GATE = """
CREATE FUNCTION gate_job(gated text, needed text[], by_rate boolean, earliest timestamptz)
RETURNS TABLE (unknown text[], starts boolean)
LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  place bigint;
  remaining integer;
BEGIN
  SELECT seq INTO place FROM jobs
  WHERE id = gated AND state = 'scheduled' AND due_at IS NULL AND needs = 0 AND NOT rated;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'job % is not one that can be given gates', gated;
  END IF;
  PERFORM 1 FROM jobs WHERE id = ANY(needed) ORDER BY id FOR NO KEY UPDATE;
  INSERT INTO dependencies (job_seq, job, needs, ended_as)
  SELECT place, gated, w.id, coalesce(w.ended, CASE WHEN NOT w.known THEN 'unknown' END) FROM (
    SELECT n.id, j.id IS NOT NULL OR a.state IS NOT NULL AS known,
      CASE WHEN j.id IS NULL THEN a.state WHEN j.finished_at IS NOT NULL THEN j.state END AS ended
    FROM (SELECT DISTINCT unnest(needed) AS id) n LEFT JOIN jobs j ON j.id = n.id
    LEFT JOIN LATERAL (SELECT state FROM jobs_archive WHERE jobs_archive.id = n.id ORDER BY seq DESC LIMIT 1) a ON true
  ) w WHERE w.ended IS DISTINCT FROM 'succeeded';
  GET DIAGNOSTICS remaining = ROW_COUNT;
  UPDATE jobs SET awaited = true WHERE id = ANY(needed) AND finished_at IS NULL AND NOT awaited;
  starts := remaining = 0 AND NOT by_rate AND coalesce(earliest <= now(), true);
  UPDATE jobs SET needs = remaining, rated = by_rate, not_before = earliest,
    state = CASE WHEN gate_job.starts THEN 'accepted' ELSE 'scheduled' END,
    due_at = CASE WHEN remaining = 0 AND NOT by_rate THEN earliest END
  WHERE id = gated;
  unknown := ARRAY(
    SELECT d.needs FROM dependencies d WHERE d.job_seq = place AND d.ended_as = 'unknown' ORDER BY d.needs
  );
  RETURN NEXT;
END
$$
"""

# In the transaction of the end, whoever writes it. It touches no row that anybody but the ender of this job changes;
# the gates themselves are opened after it (`routing.gates`).
_NOTE = """
CREATE FUNCTION note_awaited_end() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
  UPDATE dependencies SET ended_as = NEW.state WHERE needs = NEW.id AND ended_as IS NULL;
  RETURN NULL;
END
$$
"""
_TRIGGER = """
CREATE TRIGGER jobs_awaited AFTER UPDATE OF finished_at ON jobs FOR EACH ROW
WHEN (NEW.awaited AND NEW.finished_at IS NOT NULL AND OLD.finished_at IS NULL) EXECUTE FUNCTION note_awaited_end()
"""

# A token bucket, by Postgres's clock. The row of the rate is locked: of two callers the second counts what the first
# let go. What was let go and has not started yet takes room in it, so a cluster that was full does not start all of it
# at once; nor are starts saved up while no job is held back: then one may go at once.
_OPEN_RATE = f"""
CREATE FUNCTION open_rate(task text, declared double precision, declared_as text, burst double precision, most integer)
RETURNS SETOF text
LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  r rates%ROWTYPE;
  at_most double precision;
  filled double precision;
  room integer := most;
  gone integer := 0;
BEGIN
  IF declared IS NOT NULL THEN
    INSERT INTO rates AS known (name, rate, said) VALUES (task, declared, declared_as)
    ON CONFLICT (name) DO UPDATE SET rate = excluded.rate, said = excluded.said
    WHERE NOT known.by_control AND known.said <> excluded.said;
  END IF;
  SELECT * INTO r FROM rates WHERE name = task FOR UPDATE;
  IF FOUND AND r.rate > 0 THEN
    at_most := greatest(1, r.rate * burst);
    filled := least(CASE WHEN r.idle THEN 1 ELSE at_most END,
      r.tokens + r.rate * greatest(0, extract(epoch FROM clock_timestamp() - r.counted_at)));
    room := least(most, floor(least(filled, at_most - (SELECT count(*) FROM jobs WHERE name = task AND {_LET_GO}))));
  END IF;
  IF room > 0 THEN
    RETURN QUERY UPDATE jobs SET due_at = clock_timestamp() WHERE id IN (
      SELECT id FROM jobs WHERE name = task AND {_HELD} AND (not_before IS NULL OR not_before <= clock_timestamp())
      ORDER BY (-priority), seq LIMIT room FOR NO KEY UPDATE SKIP LOCKED
    ) RETURNING id;
    GET DIAGNOSTICS gone = ROW_COUNT;
  END IF;
  IF r.rate > 0 AND (gone > 0 OR r.idle) THEN
    UPDATE rates SET tokens = filled - gone, counted_at = greatest(r.counted_at, clock_timestamp()),
      idle = NOT EXISTS (SELECT 1 FROM jobs WHERE name = task AND {_HELD})
    WHERE name = task;
  END IF;
END
$$
"""

_FUNCTIONS = {
    "claim_key(text, text, double precision)": _CLAIM,
    "gate_job(text, text[], boolean, timestamptz)": _GATE,
    "note_awaited_end()": _NOTE,
    "open_rate(text, double precision, text, double precision, integer)": _OPEN_RATE,
}


def _flag(name: str, comment: str) -> sa.Column[bool]:
    return sa.Column(name, sa.Boolean, nullable=False, server_default=sa.text("false"), comment=comment)


def _moment(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False, server_default=sa.text("clock_timestamp()"))


def upgrade() -> None:
    op.add_column("jobs", _flag("awaited", "another job waits for its end"))
    op.add_column(
        "jobs",
        sa.Column("needs", sa.Integer, nullable=False, server_default=sa.text("0"), comment="jobs that it waits for"),
    )
    op.add_column("jobs", _flag("rated", "it starts by the rate of its task"))
    op.add_column(
        "jobs",
        sa.Column("not_before", sa.DateTime(timezone=True), comment="its due_at once its gates are open"),
    )
    op.create_index("jobs_let_go", "jobs", ["name"], postgresql_where=sa.text(_LET_GO))
    op.create_index("jobs_held", "jobs", ["name", sa.text("(- priority)"), "seq"], postgresql_where=sa.text(_HELD))
    op.create_table(
        "unique_keys",
        sa.Column("key", sa.Text, primary_key=True, comment="a digest of what must be unique"),
        sa.Column("job", sa.Text, nullable=False, comment="who has it"),
        sa.Column("until", sa.DateTime(timezone=True), comment="it has it until then, though it ends"),
        _moment("claimed_at"),
    )
    op.create_table(
        "dependencies",
        sa.Column("job_seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("needs", sa.Text, primary_key=True, comment="the job whose success it waits for"),
        sa.Column("job", sa.Text, nullable=False, comment="the job that waits"),
        sa.Column("ended_as", sa.Text, comment="how the other ended; null: it has not"),
    )
    op.create_index("dependencies_open", "dependencies", ["needs"], postgresql_where=sa.text("ended_as IS NULL"))
    op.create_index("dependencies_ripe", "dependencies", ["job"], postgresql_where=sa.text("ended_as IS NOT NULL"))
    op.create_table(
        "rates",
        sa.Column("name", sa.Text, primary_key=True, comment="name of a task"),
        sa.Column("rate", sa.Float(53), nullable=False, comment="starts a second; 0: as many as fit"),
        sa.Column("said", sa.Text, nullable=False, comment="the same as somebody wrote it: 10/m"),
        _flag("by_control", "set at run time, which wins over what tasks declare"),
        sa.Column("tokens", sa.Float(53), nullable=False, server_default=sa.text("1"), comment="starts that are left"),
        _moment("counted_at"),
        sa.Column("idle", sa.Boolean, nullable=False, server_default=sa.text("true"), comment="none is held back"),
    )
    for signature, function in _FUNCTIONS.items():
        op.execute(function)
        # Whoever calls it has no say in which tables it means.
        op.execute(
            f"DO $$ BEGIN EXECUTE format('ALTER FUNCTION {signature} SET search_path = %I, pg_temp', current_schema());"
            " END $$"
        )
    op.execute(_TRIGGER)


def downgrade() -> None:
    # Nobody would open their gates any more.
    op.execute(
        "UPDATE jobs SET state = 'cancelled', step = 12, finished_at = now(), error = 'the tables were downgraded',"
        """ outbox = '{"publishes": [], "results": [{"untold": true}]}' """
        "WHERE state = 'scheduled' AND due_at IS NULL AND needs > 0"
    )
    op.execute("UPDATE jobs SET due_at = coalesce(not_before, now()) WHERE state = 'scheduled' AND due_at IS NULL")
    op.execute("DROP TRIGGER jobs_awaited ON jobs")
    for signature in _FUNCTIONS:
        op.execute(f"DROP FUNCTION {signature}")
    for table in ("rates", "dependencies", "unique_keys"):
        op.drop_table(table)
    for index in ("jobs_held", "jobs_let_go"):
        op.drop_index(index, "jobs")
    for column in ("not_before", "rated", "needs", "awaited"):
        op.drop_column("jobs", column)
