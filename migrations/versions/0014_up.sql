-- The archive in partitions by the month, in UTC, in which rows came there.

-- A partition has the name of its month. The first partition also has all that is older: the rows that are there now.
ALTER TABLE attempts_archive ADD COLUMN archived_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL;
DO $$ DECLARE
  month text := to_char(now() AT TIME ZONE 'UTC', 'YYYY_MM');
  following text := quote_literal(to_char(date_trunc('month', now() AT TIME ZONE 'UTC') + interval '1 month', 'YYYY-MM-DD') || ' 00:00:00+00');
  parent text;
  key text;
  may record;
BEGIN
  FOR parent, key IN VALUES ('jobs_archive', 'seq'), ('attempts_archive', 'job_seq, epoch, attempt') LOOP
    EXECUTE format('ALTER TABLE %I DROP CONSTRAINT %I', parent, parent || '_pkey');
    EXECUTE format('ALTER TABLE %I RENAME TO %I', parent, parent || '_' || month);
    IF parent = 'jobs_archive' THEN
      EXECUTE format('ALTER INDEX jobs_archive_id RENAME TO %I', 'jobs_archive_' || month || '_id_idx');
    END IF;
    EXECUTE format('CREATE TABLE %I (LIKE %I INCLUDING DEFAULTS INCLUDING COMMENTS) PARTITION BY RANGE (archived_at)', parent, parent || '_' || month);
    EXECUTE format('ALTER TABLE %I ADD PRIMARY KEY (%s, archived_at)', parent, key);
    EXECUTE format('ALTER TABLE %I ADD PRIMARY KEY (%s, archived_at)', parent || '_' || month, key);
    -- Who may read the old table may read the new one.
    FOR may IN SELECT grantee, privilege_type FROM pg_class, aclexplode(relacl)
      WHERE pg_class.oid = to_regclass(format('%I', parent || '_' || month)) AND grantee <> relowner LOOP
      EXECUTE format('GRANT %s ON %I TO %s', may.privilege_type, parent,
        CASE WHEN may.grantee = 0 THEN 'PUBLIC' ELSE CAST(CAST(may.grantee AS regrole) AS text) END);
    END LOOP;
  END LOOP;
  CREATE INDEX jobs_archive_id ON jobs_archive (id);
  FOREACH parent IN ARRAY ARRAY['jobs_archive', 'attempts_archive'] LOOP
    EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (MINVALUE) TO (%s)', parent, parent || '_' || month, following);
  END LOOP;
END $$;

-- Make the partitions of this month, or of the month in a week, where they are missing. A table that is attached, instead
-- of one created as a partition, locks out neither readers nor other inserts. Of two callers at once the second finds the
-- work done.
CREATE FUNCTION open_archive(ahead boolean) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  start timestamp := date_trunc('month', (now() + CASE WHEN ahead THEN interval '7 days' ELSE interval '0' END) AT TIME ZONE 'UTC');
  parent text;
  month text;
BEGIN
  FOREACH parent IN ARRAY ARRAY['jobs_archive', 'attempts_archive'] LOOP
    month := parent || '_' || to_char(start, 'YYYY_MM');
    IF EXISTS (SELECT FROM pg_inherits WHERE inhparent = to_regclass(parent) AND inhrelid = to_regclass(month)) THEN
      CONTINUE;
    END IF;
    PERFORM pg_advisory_xact_lock(7021784069121140001 /* 'archive!' */);
    IF NOT EXISTS (SELECT FROM pg_inherits WHERE inhparent = to_regclass(parent) AND inhrelid = to_regclass(month)) THEN
      EXECUTE format('CREATE TABLE %I (LIKE %I INCLUDING ALL)', month, parent);
      EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', parent, month,
        to_char(start, 'YYYY-MM-DD') || ' 00:00:00+00',
        to_char(start + interval '1 month', 'YYYY-MM-DD') || ' 00:00:00+00');
    END IF;
  END LOOP;
END
$$;

-- Drop the oldest month, if it ended more than so many seconds ago; return its name, or null. Whoever reads the archive
-- is waited for one second: meanwhile nobody else gets at it.
CREATE FUNCTION drop_archived(keep double precision) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  kept text := to_char((now() - make_interval(secs => greatest(keep, 0))) AT TIME ZONE 'UTC', 'YYYY_MM');
  oldest text;
  tables text;
BEGIN
  SELECT right(c.relname, 7), string_agg(format('%I', c.relname), ', ' ORDER BY c.relname DESC) INTO oldest, tables
  FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
  WHERE i.inhparent IN (to_regclass('jobs_archive'), to_regclass('attempts_archive'))
    AND c.relname ~ '^(jobs|attempts)_archive_[0-9]{4}_[0-9]{2}$'
  GROUP BY 1 ORDER BY 1 LIMIT 1;
  IF oldest IS NULL OR oldest >= kept THEN
    RETURN NULL;
  END IF;
  PERFORM set_config('lock_timeout', '1s', true);
  EXECUTE 'DROP TABLE ' || tables;
  RETURN oldest;
END
$$;

-- It takes away what nobody has anywhere else. Every role of the database would get the right to call a new function.
REVOKE ALL ON FUNCTION drop_archived(double precision) FROM PUBLIC;

-- The month is there before its first row: else the rows would stay in the table of jobs. Rows are named by arrays, and the
-- open attempts are counted for each job: Postgres would join by reading all of `attempts` for each thousand jobs. The state
-- is not asked for, since a job with an end has a final one: by the index of states Postgres would look at all ended jobs.
CREATE OR REPLACE FUNCTION archive_finished(keep double precision, most integer) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  moved bigint;
BEGIN
PERFORM open_archive(false);
WITH chosen AS MATERIALIZED (
  SELECT j.id FROM jobs j
  WHERE j.finished_at <= now() - make_interval(secs => keep) AND j.step <> 3 AND j.outbox IS NULL
    AND (SELECT count(*) FROM attempts a WHERE a.job_id = j.id AND a.ended_at IS NULL) = 0
  ORDER BY j.finished_at LIMIT most FOR UPDATE OF j SKIP LOCKED
), gone AS (
  DELETE FROM jobs WHERE id = ANY(ARRAY(SELECT id FROM chosen))
  RETURNING jobs.seq, jobs.id, jobs.name, jobs.state, jobs.epoch, jobs.attempt, jobs.losses, jobs.worker, jobs.incarnation, jobs.priority, jobs.request, jobs.declared, jobs.queue, jobs.retries, jobs.nesting, jobs.root_id, jobs.parent_id, jobs.submitted_at, jobs.due_at, jobs.expires_at, jobs.admitted_at, jobs.started_at, jobs.finished_at, jobs.error, octet_length(jobs.message) AS message_bytes
), kept AS (
  INSERT INTO jobs_archive (seq, id, name, state, epoch, attempt, losses, worker, incarnation, priority, request, declared, queue, retries, nesting, root_id, parent_id, submitted_at, due_at, expires_at, admitted_at, started_at, finished_at, error, message_bytes) SELECT seq, id, name, state, epoch, attempt, losses, worker, incarnation, priority, request, declared, queue, retries, nesting, root_id, parent_id, submitted_at, due_at, expires_at, admitted_at, started_at, finished_at, error, message_bytes FROM gone
), tries AS (
  DELETE FROM attempts WHERE job_id = ANY(ARRAY(SELECT id FROM gone))
  RETURNING attempts.job_id, attempts.epoch, attempts.attempt, attempts.worker, attempts.incarnation, attempts.admitted_at, attempts.started_at, attempts.ended_at, attempts.outcome, attempts.error
), kept_too AS (
  INSERT INTO attempts_archive (job_seq, epoch, attempt, worker, incarnation, admitted_at, started_at, ended_at, outcome, error) SELECT gone.seq, tries.epoch, tries.attempt, tries.worker, tries.incarnation, tries.admitted_at, tries.started_at, tries.ended_at, tries.outcome, tries.error FROM tries JOIN gone ON gone.id = tries.job_id
)
SELECT count(*) INTO moved FROM gone;
RETURN moved;
END
$$;


DO $$ DECLARE
  signature text;
BEGIN
  FOREACH signature IN ARRAY ARRAY[
    'archive_finished(double precision, integer)', 'open_archive(boolean)', 'drop_archived(double precision)'
  ] LOOP
    EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', signature, current_schema());
  END LOOP;
END $$;
