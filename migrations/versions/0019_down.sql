-- Jobs that a limit by key holds back become due: nothing would ever let them go.
UPDATE jobs SET due_at = coalesce(not_before, now())
WHERE key_limits IS NOT NULL AND state = 'scheduled' AND due_at IS NULL AND needs = 0 AND NOT rated;

DROP TRIGGER jobs_keys_filed ON jobs;
DROP TRIGGER jobs_keys_moved ON jobs;
DROP TRIGGER jobs_keys_gone ON jobs;
DROP FUNCTION open_keys(text[], double precision, integer);
DROP FUNCTION open_lines(text[], double precision, integer);
DROP FUNCTION take_start(text, double precision);
DROP FUNCTION lines_of_key(text, integer);
DROP FUNCTION file_job_keys();
DROP FUNCTION key_phase(text, smallint, timestamptz, timestamptz, integer, timestamptz);
DROP TABLE key_notes;
DROP TABLE key_rates;
DROP TABLE job_keys;
DROP INDEX jobs_held;

CREATE OR REPLACE FUNCTION gate_job(gated text, needed text[], by_rate boolean, earliest timestamptz)
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

CREATE OR REPLACE FUNCTION open_rate(task text, declared double precision, declared_as text, burst double precision, most integer)
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

ALTER TABLE jobs DROP COLUMN key_limits, DROP COLUMN successor_key_limits;
CREATE INDEX jobs_held ON jobs (name, (- priority), seq) WHERE rated AND state = 'scheduled' AND due_at IS NULL AND needs = 0;

DO $$ DECLARE
  signature text;
BEGIN
  FOREACH signature IN ARRAY ARRAY[
    'gate_job(text, text[], boolean, timestamptz)',
    'open_rate(text, double precision, text, double precision, integer)'
  ] LOOP
    EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', signature, current_schema());
  END LOOP;
END $$;
