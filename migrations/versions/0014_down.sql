-- The archive in plain tables again.

DROP FUNCTION open_archive(boolean);
DROP FUNCTION drop_archived(double precision);
DO $$ DECLARE
  parent text;
  key text;
  may record;
BEGIN
  FOR parent, key IN VALUES ('jobs_archive', 'seq'), ('attempts_archive', 'job_seq, epoch, attempt') LOOP
    EXECUTE format('CREATE TABLE %I (LIKE %I INCLUDING DEFAULTS INCLUDING COMMENTS)', parent || '_plain', parent);
    EXECUTE format('INSERT INTO %I SELECT * FROM %I', parent || '_plain', parent);
    FOR may IN SELECT grantee, privilege_type FROM pg_class, aclexplode(relacl)
      WHERE pg_class.oid = to_regclass(parent) AND grantee <> relowner LOOP
      EXECUTE format('GRANT %s ON %I TO %s', may.privilege_type, parent || '_plain',
        CASE WHEN may.grantee = 0 THEN 'PUBLIC' ELSE CAST(CAST(may.grantee AS regrole) AS text) END);
    END LOOP;
    EXECUTE format('DROP TABLE %I', parent);
    EXECUTE format('ALTER TABLE %I RENAME TO %I', parent || '_plain', parent);
    EXECUTE format('ALTER TABLE %I ADD PRIMARY KEY (%s)', parent, key);
  END LOOP;
END $$;
CREATE INDEX jobs_archive_id ON jobs_archive (id);
ALTER TABLE attempts_archive DROP COLUMN archived_at;

CREATE OR REPLACE FUNCTION archive_finished(keep double precision, most integer) RETURNS bigint
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
  RETURNING jobs.seq, jobs.id, jobs.name, jobs.state, jobs.epoch, jobs.attempt, jobs.losses, jobs.worker, jobs.incarnation, jobs.priority, jobs.request, jobs.declared, jobs.queue, jobs.retries, jobs.nesting, jobs.root_id, jobs.parent_id, jobs.submitted_at, jobs.due_at, jobs.expires_at, jobs.admitted_at, jobs.started_at, jobs.finished_at, jobs.error, octet_length(jobs.message) AS message_bytes
), kept AS (
  INSERT INTO jobs_archive (seq, id, name, state, epoch, attempt, losses, worker, incarnation, priority, request, declared, queue, retries, nesting, root_id, parent_id, submitted_at, due_at, expires_at, admitted_at, started_at, finished_at, error, message_bytes) SELECT seq, id, name, state, epoch, attempt, losses, worker, incarnation, priority, request, declared, queue, retries, nesting, root_id, parent_id, submitted_at, due_at, expires_at, admitted_at, started_at, finished_at, error, message_bytes FROM gone
), tries AS (
  DELETE FROM attempts USING gone WHERE attempts.job_id = gone.id
  RETURNING gone.seq, attempts.epoch, attempts.attempt, attempts.worker, attempts.incarnation, attempts.admitted_at, attempts.started_at, attempts.ended_at, attempts.outcome, attempts.error
), kept_too AS (
  INSERT INTO attempts_archive (job_seq, epoch, attempt, worker, incarnation, admitted_at, started_at, ended_at, outcome, error) SELECT seq, epoch, attempt, worker, incarnation, admitted_at, started_at, ended_at, outcome, error FROM tries
)
SELECT count(*) INTO moved FROM gone;
RETURN moved;
END
$$;


DO $$ BEGIN
  EXECUTE format(
    'ALTER FUNCTION archive_finished(double precision, integer) SET search_path = %I, pg_temp', current_schema());
END $$;
