-- Functions with their owner's rights, and the trigger that calls one.

-- What is over: the job is in a final state, its worker has said so (step 3: not yet), whoever waits for its result has
-- been told, and no attempt of it is open. Two callers at once take different rows. (In PL/pgSQL, which plans for the
-- values that it is given: a plan for any number of rows would read all of both tables.)
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

-- Each statement of it sees what was committed before that statement. (In one statement the holder's row, committed
-- while the key was waited for, would not be seen.)
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
$$;

-- Of a row that the caller has just inserted: one that was committed has a time, or a gate already. The jobs that are
-- needed are locked in the order of their ids, as all do who lock several, until the row is committed: one that ends
-- meanwhile waits, and then knows that it is awaited.
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
$$;

-- In the transaction of the end, whoever writes it. It touches no row that anybody but the ender of this job changes;
-- the gates themselves are opened after it (`routing.store.dependencies`).
CREATE FUNCTION note_awaited_end() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
  UPDATE dependencies SET ended_as = NEW.state WHERE needs = NEW.id AND ended_as IS NULL;
  RETURN NULL;
END
$$;

-- A token bucket, by Postgres's clock. The row of the rate is locked: of two callers the second counts what the first
-- let go. What was let go and has not started yet takes room in it, so a cluster that was full does not start all of it
-- at once; nor are starts saved up while no job is held back: then one may go at once.
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
    room := least(most, floor(least(filled, at_most - (SELECT count(*) FROM jobs WHERE name = task AND rated AND (state IN ('accepted', 'waiting', 'admitted') OR (state = 'scheduled' AND due_at IS NOT NULL))))));
  END IF;
  IF room > 0 THEN
    RETURN QUERY UPDATE jobs SET due_at = clock_timestamp() WHERE id IN (
      SELECT id FROM jobs WHERE name = task AND rated AND state = 'scheduled' AND due_at IS NULL AND needs = 0 AND (not_before IS NULL OR not_before <= clock_timestamp())
      ORDER BY (-priority), seq LIMIT room FOR NO KEY UPDATE SKIP LOCKED
    ) RETURNING id;
    GET DIAGNOSTICS gone = ROW_COUNT;
  END IF;
  IF r.rate > 0 AND (gone > 0 OR r.idle) THEN
    UPDATE rates SET tokens = filled - gone, counted_at = greatest(r.counted_at, clock_timestamp()),
      idle = NOT EXISTS (SELECT 1 FROM jobs WHERE name = task AND rated AND state = 'scheduled' AND due_at IS NULL AND needs = 0)
    WHERE name = task;
  END IF;
END
$$;

-- Whoever only submits makes chords too: its owner's rights note them.
CREATE FUNCTION note_chord(noted text, parts integer, shape text) RETURNS void
LANGUAGE sql SECURITY DEFINER AS $$
  INSERT INTO chords (group_id, size, structure) VALUES (noted, parts, shape)
  ON CONFLICT (group_id) DO UPDATE SET size = coalesce(excluded.size, chords.size),
    structure = coalesce(excluded.structure, chords.structure)
$$;

CREATE TRIGGER jobs_awaited AFTER UPDATE OF finished_at ON jobs FOR EACH ROW
WHEN (NEW.awaited AND NEW.finished_at IS NOT NULL AND OLD.finished_at IS NULL) EXECUTE FUNCTION note_awaited_end();

-- Whoever calls them has no say in which tables they mean.
DO $$ DECLARE
  signature text;
BEGIN
  FOREACH signature IN ARRAY ARRAY[
    'archive_finished(double precision, integer)',
    'claim_key(text, text, double precision)',
    'gate_job(text, text[], boolean, timestamptz)',
    'note_awaited_end()',
    'open_rate(text, double precision, text, double precision, integer)'
  ] LOOP
    EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', signature, current_schema());
  END LOOP;
END $$;
