"""1,000 workers on one Redis: they register, beat, and take 10,000 jobs, and the books are exact."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from sqlalchemy import Engine, text

from benchmarks.bench import Bench
from benchmarks.processes import submitter
from benchmarks.servers import Pair
from benchmarks.size.crowd import Crowd
from benchmarks.size.scale import Scale
from benchmarks.size.stock import engine_of, environment
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.inspect import verify
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.snapshot import text as as_text
from celery_capacity.routing.recovery import rebuild

#: Processes of the crowd, and programs that submit.
PROCESSES: Final = 8
SUBMITTERS: Final = 2
#: CPUs of each worker, and seconds that a job of one CPU takes. With 2,000 slots, 10,000 jobs take at least 40 s. So
#: the workers become full, jobs wait, and releases admit.
CPUS: Final = 2
HOLD: Final = 8.0
#: Heartbeats of each worker to wait for, in renew intervals.
BEATS: Final = 2.5
#: Seconds for all jobs to end after the last was submitted.
PATIENCE: Final = 120.0
LOOK_EVERY: Final = 1.0

_ENDED: Final = text("SELECT count(*) FROM jobs WHERE state = 'succeeded'")
_RUNS: Final = text(
    "SELECT count(*), count(DISTINCT job_id), count(DISTINCT worker), "
    "coalesce(percentile_cont(0.95) WITHIN GROUP (ORDER BY extract(epoch FROM started_at - admitted_at)), 0)::float "
    "FROM attempts"
)


def worked(bench: Bench, scale: Scale) -> dict[str, float]:
    """Run jobs on a crowd: each submission is a real `delay()`, each worker has all real threads and no pool."""
    workers, jobs = scale.of(1000), scale.of(10_000)
    with bench.pair() as pair:
        engine = engine_of(pair.database_url)
        ledger = Ledger(Settings.from_environ(environment(pair)))
        rebuild.open_if_cold(engine, ledger)
        begin = time.monotonic()
        crowd = Crowd(environment(pair), workers, PROCESSES, cpus=CPUS, hold=HOLD)
        try:
            registered = time.monotonic() - begin
            live = ledger.client.zcard(keys.LEASES)
            bench.say(f"  {live} workers after {registered:.1f} s")
            seconds, violations = _run(bench, pair, engine, ledger, jobs)
            # Idle now: nothing is admitted, and each worker beats on.
            time.sleep(BEATS * ledger.settings.renew_interval)
            report = verify.check(engine, ledger.client, at_rest=True)
            with engine.connect() as connection:
                attempts, ran, used, taken = connection.execute(_RUNS).one()
            counters = {as_text(k): int(v) for k, v in ledger.client.hgetall(keys.COUNTERS).items()}
            troubles = crowd.troubles()
            bench.say(f"  {attempts} attempts of {ran} jobs on {used} workers; {counters}; {troubles[:3]}")
            wrong = [*report.lines(), *troubles]
            wrong += [f"{live} of {workers} are registered"] if live != workers else []
            free = ledger.client.zcard(keys.FREE)
            wrong += [f"{free} of {workers} may be admitted to"] if free != workers else []
            wrong += [f"{attempts} attempts of {ran} jobs, not {jobs}"] if {attempts, ran} != {jobs} else []
            for line in wrong:
                bench.say(f"  wrong: {line}")
            return {
                "workers_registered": float(live),
                "workers_jobs_s": jobs / seconds,
                "workers_start_p95_ms": taken * 1000,
                "workers_violations": float(violations + len(wrong)),
            }
        finally:
            crowd.end()
            ledger.client.close()
            engine.dispose()


def _run(bench: Bench, pair: Pair, engine: Engine, ledger: Ledger, jobs: int) -> tuple[float, int]:
    """Return the seconds from the first submission to the last end in Postgres, and the violations until then."""
    violations = 0
    with (
        submitter("ours", pair) as first_sender,
        submitter("ours", pair) as second_sender,
        ThreadPoolExecutor(SUBMITTERS) as threads,
    ):
        begin = time.monotonic()
        share = jobs // SUBMITTERS
        sent = [
            threads.submit(sender.call, "submit", task="bench.noop", count=count)
            for sender, count in ((first_sender, share), (second_sender, jobs - share))
        ]
        while True:
            with engine.connect() as connection:
                ended = int(connection.execute(_ENDED).scalar_one())
            if ended == jobs:
                break
            if time.monotonic() - begin > PATIENCE + 300 * all(not call.done() for call in sent):
                raise RuntimeError(f"only {ended} of {jobs} jobs have ended")
            report = verify.check(engine, ledger.client, at_rest=False, patience=2.0)
            violations += len(report.lines())
            for line in report.lines():
                bench.say(f"  wrong meanwhile: {line}")
            time.sleep(LOOK_EVERY)
        seconds = time.monotonic() - begin
        for call in sent:
            call.result()
    bench.say(f"  {jobs} jobs in {seconds:.1f} s, {violations} violations meanwhile")
    return seconds, violations
