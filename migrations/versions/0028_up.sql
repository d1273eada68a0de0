-- Columns that may be null need no rewrite of a table, and its partitions get them at once. A worker of the release before
-- moves jobs by the function below, and so keeps both columns too.
ALTER TABLE jobs_archive ADD COLUMN shape TEXT, ADD COLUMN expected_ms BIGINT;
COMMENT ON COLUMN jobs_archive.shape IS 'that of jobs; null: archived before revision 0028';
COMMENT ON COLUMN jobs_archive.expected_ms IS 'that of jobs; null: archived before revision 0028';
ALTER TABLE declarations ADD COLUMN options JSONB;
COMMENT ON COLUMN declarations.options IS
  'run time, time limits, tenant, place and alternatives; null: none, or published before revision 0028';

-- As before, and the shape and the expected run time move too.
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
  RETURNING jobs.seq, jobs.id, jobs.name, jobs.state, jobs.epoch, jobs.attempt, jobs.losses, jobs.worker, jobs.incarnation, jobs.priority, jobs.request, jobs.declared, jobs.queue, jobs.retries, jobs.nesting, jobs.root_id, jobs.parent_id, jobs.submitted_at, jobs.due_at, jobs.expires_at, jobs.admitted_at, jobs.started_at, jobs.finished_at, jobs.error, jobs.shape, jobs.expected_ms, octet_length(jobs.message) AS message_bytes
), kept AS (
  INSERT INTO jobs_archive (seq, id, name, state, epoch, attempt, losses, worker, incarnation, priority, request, declared, queue, retries, nesting, root_id, parent_id, submitted_at, due_at, expires_at, admitted_at, started_at, finished_at, error, shape, expected_ms, message_bytes) SELECT seq, id, name, state, epoch, attempt, losses, worker, incarnation, priority, request, declared, queue, retries, nesting, root_id, parent_id, submitted_at, due_at, expires_at, admitted_at, started_at, finished_at, error, shape, expected_ms, message_bytes FROM gone
), tries AS (
  DELETE FROM attempts WHERE job_id = ANY(ARRAY(SELECT id FROM gone))
  RETURNING attempts.job_id, attempts.epoch, attempts.attempt, attempts.worker, attempts.incarnation, attempts.admitted_at, attempts.started_at, attempts.ended_at, attempts.outcome, attempts.error
), kept_too AS (
  INSERT INTO attempts_archive (job_seq, epoch, attempt, worker, incarnation, admitted_at, started_at, ended_at, outcome, error) SELECT gone.seq, tries.epoch, tries.attempt, tries.worker, tries.incarnation, tries.admitted_at, tries.started_at, tries.ended_at, tries.outcome, tries.error FROM tries JOIN gone ON gone.id = tries.job_id
), lines AS (
  DELETE FROM job_lines WHERE job_seq = ANY(ARRAY(SELECT seq FROM gone))
)
SELECT count(*) INTO moved FROM gone;
RETURN moved;
END
$$;

DO $$ BEGIN
  EXECUTE format(
    'ALTER FUNCTION archive_finished(double precision, integer) SET search_path = %I, pg_temp', current_schema());
END $$;
