-- The least that each part of the platform needs in Postgres. Run it as a superuser on the platform's database, after
-- `celery -A platform db upgrade`, and again after each upgrade; what is there already is left as it is.
--
--   platform_owner      owns the tables, and changes them (`celery -A platform db upgrade`)
--   platform_worker     workers and beat: reads and writes what they work on, changes no table
--   platform_submitter  programs that submit: adds jobs, changes none, and reads no message
--   platform_dashboard  `cluster`, `jobs`, `job`, the dashboard: reads all but what the jobs carry
--
-- Give each a way to log in, for instance: ALTER ROLE platform_worker LOGIN PASSWORD '...';

DO $$
DECLARE
  role text;
BEGIN
  FOREACH role IN ARRAY ARRAY['platform_owner', 'platform_worker', 'platform_submitter', 'platform_dashboard'] LOOP
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role) THEN
      EXECUTE format('CREATE ROLE %I NOLOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE', role);
    END IF;
  END LOOP;
  EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
  EXECUTE format(
    'GRANT CONNECT ON DATABASE %I TO platform_owner, platform_worker, platform_submitter, platform_dashboard',
    current_database());
END
$$;

REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO platform_worker, platform_submitter, platform_dashboard;
GRANT USAGE, CREATE ON SCHEMA public TO platform_owner;

ALTER TABLE jobs OWNER TO platform_owner;
ALTER TABLE attempts OWNER TO platform_owner;
ALTER TABLE jobs_archive OWNER TO platform_owner;
ALTER TABLE attempts_archive OWNER TO platform_owner;
DO $$
DECLARE
  month regclass;
BEGIN
  FOR month IN SELECT inhrelid FROM pg_inherits WHERE inhparent IN ('jobs_archive'::regclass, 'attempts_archive'::regclass)
  LOOP
    EXECUTE format('ALTER TABLE %s OWNER TO platform_owner', month);
  END LOOP;
END
$$;
ALTER FUNCTION archive_finished(double precision, integer) OWNER TO platform_owner;
ALTER FUNCTION open_archive(boolean) OWNER TO platform_owner;
ALTER FUNCTION drop_archived(double precision) OWNER TO platform_owner;
ALTER TABLE unique_keys OWNER TO platform_owner;
ALTER TABLE dependencies OWNER TO platform_owner;
ALTER TABLE rates OWNER TO platform_owner;
ALTER TABLE retries OWNER TO platform_owner;
ALTER TABLE infeasible OWNER TO platform_owner;
ALTER TABLE ageing OWNER TO platform_owner;
ALTER TABLE ageing_marks OWNER TO platform_owner;
ALTER TABLE chords OWNER TO platform_owner;
ALTER TABLE chord_parts OWNER TO platform_owner;
ALTER FUNCTION note_chord(text, integer, text) OWNER TO platform_owner;
ALTER FUNCTION claim_key(text, text, double precision) OWNER TO platform_owner;
ALTER FUNCTION gate_job(text, text[], boolean, timestamptz) OWNER TO platform_owner;
ALTER FUNCTION note_awaited_end() OWNER TO platform_owner;
ALTER FUNCTION open_rate(text, double precision, text, double precision, integer) OWNER TO platform_owner;
ALTER TABLE workers OWNER TO platform_owner;
ALTER TABLE cordons OWNER TO platform_owner;
ALTER TABLE pauses OWNER TO platform_owner;
ALTER TABLE tenants OWNER TO platform_owner;
ALTER TABLE operator_actions OWNER TO platform_owner;
ALTER TABLE audit OWNER TO platform_owner;
ALTER TABLE job_lines OWNER TO platform_owner;
ALTER TABLE authority OWNER TO platform_owner;
ALTER TABLE runner OWNER TO platform_owner;
ALTER TABLE declarations OWNER TO platform_owner;
ALTER TABLE run_times OWNER TO platform_owner;
ALTER TABLE job_keys OWNER TO platform_owner;
ALTER TABLE key_rates OWNER TO platform_owner;
ALTER TABLE key_notes OWNER TO platform_owner;
ALTER TABLE run_times_read OWNER TO platform_owner;
ALTER TABLE estimates OWNER TO platform_owner;
ALTER TABLE reservations OWNER TO platform_owner;
ALTER TABLE quarantine OWNER TO platform_owner;
ALTER TABLE alembic_version OWNER TO platform_owner;

REVOKE ALL ON ALL TABLES IN SCHEMA public FROM PUBLIC, platform_worker, platform_submitter, platform_dashboard;

-- Workers. They delete no job: what has ended long ago is moved by a function, with its owner's rights.
-- To drop old months of the archive is the owner's to do, or to allow: for `PLATFORM_KEEP_ARCHIVED`, which workers read,
-- GRANT EXECUTE ON FUNCTION drop_archived(double precision) TO platform_worker, here or elsewhere.
REVOKE ALL ON FUNCTION archive_finished(double precision, integer), open_archive(boolean),
  drop_archived(double precision) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION archive_finished(double precision, integer), open_archive(boolean) TO platform_worker;
GRANT SELECT ON jobs_archive, attempts_archive TO platform_worker;
GRANT SELECT, INSERT, UPDATE ON jobs, attempts, workers, declarations TO platform_worker;
GRANT SELECT, DELETE ON unique_keys, dependencies TO platform_worker;
GRANT DELETE ON workers TO platform_worker;
GRANT SELECT, INSERT, UPDATE ON rates TO platform_worker;
GRANT SELECT, INSERT, UPDATE (seq) ON retries TO platform_worker;
GRANT SELECT, INSERT, UPDATE, DELETE ON infeasible, ageing TO platform_worker;
GRANT SELECT, INSERT, DELETE ON ageing_marks TO platform_worker;
GRANT SELECT, UPDATE, DELETE ON chords TO platform_worker;
GRANT SELECT, INSERT, DELETE ON chord_parts TO platform_worker;
GRANT SELECT, UPDATE ON authority TO platform_worker;
-- Operators use this role too: `cordon`, `drain`, `pause`, `priority`, `tenant`, `cancel`, `retry`.
GRANT SELECT, INSERT, UPDATE, DELETE ON cordons, pauses, tenants TO platform_worker;
-- So does a dashboard in which people act. Rows of the audit end after `PLATFORM_KEEP_AUDIT`, by a duty of workers.
GRANT SELECT, INSERT ON operator_actions TO platform_worker;
GRANT SELECT, INSERT, DELETE ON audit, job_lines TO platform_worker;
GRANT UPDATE (outcome, details, ended_at) ON audit TO platform_worker;
GRANT SELECT, INSERT, UPDATE ON runner, run_times_read TO platform_worker;
GRANT SELECT, INSERT, UPDATE, DELETE ON run_times, estimates, reservations TO platform_worker;
-- Limits by key: rows come in by a trigger and functions with their owner's rights. Notes are taken away once followed.
GRANT SELECT, UPDATE (phase) ON job_keys TO platform_worker;
GRANT SELECT, UPDATE, DELETE ON key_notes TO platform_worker;
GRANT SELECT, DELETE ON key_rates TO platform_worker;
GRANT SELECT, INSERT, DELETE ON quarantine TO platform_worker;
-- Its numbers count all messages that were set aside, also those that were dropped.
GRANT SELECT ON SEQUENCE quarantine_id_seq TO platform_worker, platform_dashboard;
GRANT SELECT ON alembic_version TO platform_worker;

-- Submitters. Of a row they see what tells whether a publish is the same again, and nothing that it carries.
GRANT INSERT ON jobs TO platform_submitter;
GRANT SELECT (id, seq, state, epoch, attempt, step, retries, nesting) ON jobs TO platform_submitter;
GRANT SELECT ON authority, declarations, rates, run_times TO platform_submitter;

-- Constraints are made by functions with their owner's rights: whoever submits may hold its own new job back, and has
-- no say in others.
REVOKE ALL ON FUNCTION claim_key(text, text, double precision), gate_job(text, text[], boolean, timestamptz),
  note_awaited_end(), open_rate(text, double precision, text, double precision, integer), file_job_keys(),
  lines_of_key(text, integer), take_start(text, double precision),
  open_lines(text[], double precision, integer), open_keys(text[], double precision, integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION claim_key(text, text, double precision), gate_job(text, text[], boolean, timestamptz),
  open_rate(text, double precision, text, double precision, integer),
  open_keys(text[], double precision, integer) TO platform_worker, platform_submitter;
GRANT EXECUTE ON FUNCTION open_lines(text[], double precision, integer) TO platform_worker;

-- A chord is noted in the same way while Redis is away.
REVOKE ALL ON FUNCTION note_chord(text, integer, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION note_chord(text, integer, text) TO platform_worker, platform_submitter;

-- Those who look. `message`, `successor` and `outbox` hold the arguments and the results of jobs.
GRANT SELECT (id, seq, name, state, epoch, attempt, step, losses, worker, incarnation, priority, request, shape, declared,
  queue, rerun, retries, nesting, root_id, parent_id, replaces, submitted_at, due_at, expires_at, admitted_at, started_at,
  finished_at, revoked_at, error, needs, rated, not_before, progress, behind, reprioritized,
  expected_ms, key_limits) ON jobs TO platform_dashboard;
GRANT SELECT ON attempts, workers, cordons, pauses, tenants, operator_actions, audit, authority, runner, declarations,
  dependencies, rates, retries, job_lines, infeasible, run_times, run_times_read, estimates, reservations, job_keys, key_rates,
  alembic_version TO platform_dashboard;
GRANT SELECT ON jobs_archive, attempts_archive TO platform_dashboard;
GRANT SELECT (id, queue, reason, worker, seen_at) ON quarantine TO platform_dashboard;

-- The same as one relation, for tools that list columns by themselves.
CREATE OR REPLACE VIEW jobs_public AS
  SELECT id, seq, name, state, epoch, attempt, losses, worker, priority, request, shape, declared, queue, retries,
    root_id, parent_id, submitted_at, due_at, expires_at, admitted_at, started_at, finished_at, error,
    length(message) AS message_bytes
  FROM jobs;
ALTER VIEW jobs_public OWNER TO platform_owner;
GRANT SELECT ON jobs_public TO platform_dashboard;
