"""The demo: a job trace replayed by real workers, measured by its tasks and judged by the invariants.

A replay removes everything that it makes: workers, a Redis list of records, and a private pair of servers unless URLs
are given. The list has an entry for each run of a task. So peaks and times are measured facts, and not the ledger's
account of itself.
"""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import redis
from sqlalchemy import ARRAY, Engine, Text, bindparam, func, select

from celery_capacity import create_app, migrations
from celery_capacity.platform.console.terminal import Meter, Meters
from celery_capacity.platform.demo import predictions, trace
from celery_capacity.platform.embedded import servers
from celery_capacity.platform.processes.launch import WorkerSpec, await_ready, page_of, pause, start_page, start_worker
from celery_capacity.platform.processes.supervisor import COLD, WARM, Step, Supervisor
from celery_capacity.platform.tasks import SLEEP
from celery_capacity.routing.config.secret_files import SUFFIX
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database import schema
from celery_capacity.routing.forecast.whatif import Today, read_today
from celery_capacity.routing.inspect import overview, verify
from celery_capacity.routing.ledger.connection import connect, quick_client
from celery_capacity.routing.model.amounts import CPUS, cpus_number, format_cpus
from celery_capacity.routing.model.states import FINAL, State
from celery_capacity.routing.recovery import transition_log
from celery_capacity.workers.process.stores import make_engine, platform_of

#: Workers of a demo that names none.
WORKERS = (WorkerSpec("worker-01", 72_000), WorkerSpec("worker-02", 16_000))

#: Seconds between two looks at the cluster while the trace runs.
LOOK = 0.25

#: Seconds between two queries to Postgres for jobs that ended without a record.
ASK = 2.0

#: Maximum number of failed jobs whose errors are shown.
SHOWN_ERRORS = 5


@dataclass(frozen=True)
class Replayed:
    """Input of a replay. `scale`: how many times faster than the trace. `expected`: the calls say how long jobs run.

    `whatif`: forecasts are made meanwhile, and compared with what happens.
    """

    name: str
    jobs: tuple[trace.Job, ...]
    scale: float
    workers: tuple[WorkerSpec, ...]
    expected: bool = False
    whatif: bool = False


@dataclass(frozen=True)
class WorkerLine:
    """Measurements of one worker, in millicores. `cpus` is None for a worker of another owner that left."""

    name: str
    cpus: int | None
    peak: int
    average: int
    jobs: int

    @property
    def fits(self) -> bool:
        return self.cpus is not None and self.peak <= self.cpus


@dataclass(frozen=True)
class Report:
    """A finished replay. `states` counts the jobs by state; `errors` has (row, state, text) of failed jobs."""

    replayed: Replayed
    states: Mapping[str, int]
    errors: tuple[tuple[int, str, str], ...]
    records: tuple[trace.Record, ...]
    submitted: Mapping[int, float]
    summary: trace.Summary
    workers: tuple[WorkerLine, ...]
    doubled: tuple[int, ...]
    delay: float  #: seconds by which the most delayed submission missed its time
    invariants: verify.Report
    predictions: tuple[predictions.Prediction, ...] | None = None

    @property
    def ok(self) -> bool:
        """Return True if each job succeeded and ran once, no worker exceeded its CPUs, and the invariants hold."""
        return (
            self.states.get(State.SUCCEEDED, 0) == len(self.replayed.jobs) == len(self.records)
            and not self.doubled
            and all(worker.fits for worker in self.workers)
            and self.invariants.holds
        )

    def to_json(self) -> dict[str, Any]:
        """Return the object that `demo --json` prints, in seconds and CPUs."""
        return {
            "trace": self.replayed.name,
            "scale": self.replayed.scale,
            "jobs": len(self.replayed.jobs),
            "states": dict(self.states),
            "makespan_seconds": round(self.summary.makespan, 3),
            "wait_seconds": {
                "mean": round(self.summary.wait_mean, 6),
                "p95": round(self.summary.wait_p95, 6),
                "max": round(self.summary.wait_max, 6),
            },
            "submission_delay_seconds": round(self.delay, 6),
            "workers": [
                {
                    "name": worker.name,
                    "cpus": None if worker.cpus is None else cpus_number(worker.cpus),
                    "peak_cpus": cpus_number(worker.peak),
                    "average_cpus": cpus_number(worker.average),
                    "jobs": worker.jobs,
                }
                for worker in self.workers
            ],
            "forecasts": None if self.predictions is None else [made.to_json() for made in self.predictions],
            "run_twice": list(self.doubled),
            "errors": [{"job": row, "state": state, "error": text} for row, state, text in self.errors],
            "invariants": self.invariants.to_json(),
            "ok": self.ok,
        }


def replay(
    replayed: Replayed, settings: Settings, environ: Mapping[str, str], meters: Meters, say: Callable[[str], None]
) -> Report:
    """Start the workers, submit the jobs at their times, wait for the last, and judge. `say` prints a line.

    Raises Interrupted, ChildDied, NotReady, and the errors of the servers and the submission. Nothing of the replay is
    left running then. With given URLs, jobs that have not run are revoked.
    """
    supervisor = Supervisor(orphans=signal.SIGKILL)  # kill: their servers may be gone too, so no warm end is possible
    with closing(supervisor), supervisor.interruptible(), ExitStack() as stack:
        private = settings.redis_url is None
        settings = _with_servers(settings, stack)
        say(servers.describe(settings))
        run_environment = _environ(environ, settings, private)
        stack.enter_context(_environment(run_environment))
        run = _Run(replayed, settings, supervisor, meters)
        stack.callback(run.close)
        try:
            say("Starting " + ", ".join(f"{w.name} with {format_cpus(w.cpus)} CPUs" for w in replayed.workers))
            page = start_page(supervisor, run_environment)
            workers = [
                start_worker(supervisor, w, run_environment, pool="threads", slots=w.slots) for w in replayed.workers
            ]
            await_ready(supervisor, [*workers, page])
            say(f"Watch it in a browser: {page_of(page)}")
            run.submit()
            run.wait()
            report = run.judge()
        except BaseException:
            if private:
                supervisor.end(supervisor.children, (Step(COLD.signum, 3.0),))
            else:
                say("Taking back what has not run; what runs comes to its end (Ctrl-C again breaks it off).")
                run.revoke()
                supervisor.end(supervisor.children, (WARM, COLD))
                run.settle()
            raise
        supervisor.end(supervisor.children, (replace(WARM, patience=20.0), COLD))
        return report


def _with_servers(settings: Settings, stack: ExitStack) -> Settings:
    """Return the given servers, with tables made if there were none, or a private pair while `stack` lasts."""
    if settings.redis_url is None or settings.database_url is None:
        pair = stack.enter_context(servers.private_pair())
        return settings.with_urls(pair.redis_url, pair.database_url)
    if migrations.current(settings.database_url) is None:
        migrations.upgrade(settings.database_url)
    migrations.check(settings.database_url)
    return settings


def _environ(environ: Mapping[str, str], settings: Settings, private: bool) -> dict[str, str]:
    """Return the environment of workers and submitter. On a private pair no variable leads to other servers."""
    if not private:
        return dict(environ)
    urls = {"REDIS_URL": str(settings.redis_url), "DATABASE_URL": str(settings.database_url)}
    others = ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND")
    left_out = {*others, *(name + SUFFIX for name in others)}
    return {name: value for name, value in environ.items() if name not in left_out} | urls


@contextmanager
def _environment(environ: Mapping[str, str]) -> Iterator[None]:
    """Make this the environment during the block: `create_app` reads its URLs there, as for any user."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Run:
    """The jobs of one replay in progress."""

    def __init__(
        self,
        replayed: Replayed,
        settings: Settings,
        supervisor: Supervisor,
        meters: Meters,
    ) -> None:
        self._replayed = replayed
        self._settings = settings
        self._supervisor = supervisor
        self._meters = meters
        self._id = f"demo-{uuid.uuid4().hex[:12]}"
        self._log = f"demo:log:{self._id}"
        self._redis: redis.Redis = connect(str(settings.redis_url), settings.store_timeout)
        self._reader = quick_client(self._redis)
        self._engine: Engine = make_engine(str(settings.database_url))
        self._submitted: dict[int, float] = {}
        self._copies: list[Today] = []
        self._delay = 0.0
        self._app: Any = None

    def close(self) -> None:
        """Delete the records and close the connections. The servers themselves may be gone."""
        with suppress(redis.RedisError):  # the list expires by itself
            self._redis.delete(self._log)
        self._redis.close()
        self._reader.close()
        self._engine.dispose()

    def _job_id(self, row: int) -> str:
        return f"{self._id}-{row}"

    def submit(self) -> None:
        """Submit each job at its time, through the public API alone."""
        self._app = create_app()
        begun = time.monotonic()
        for planned in trace.plan(self._replayed.jobs, self._replayed.scale):
            due = begun + planned.at
            self._look_until(due)
            job = planned.job
            self._submitted[job.row] = time.time()
            self._app.send_task(
                SLEEP,
                kwargs={"seconds": planned.seconds, "job": job.row, "log": self._log},
                task_id=self._job_id(job.row),
                ignore_result=True,
                cpus=cpus_number(job.cpus),
                **({"expected": planned.seconds} if self._replayed.expected else {}),
                **({"tenant": job.tenant} if job.tenant else {}),
            )
            self._delay = max(self._delay, time.monotonic() - due)
            if self._replayed.whatif and predictions.due(len(self._submitted), len(self._replayed.jobs)):
                self._copies.append(self._copy())

    def _copy(self) -> Today:
        with self._engine.execution_options(isolation_level="REPEATABLE READ").connect() as connection:
            return read_today(self._reader, connection, self._settings)

    def _predictions(self, records: Sequence[trace.Record]) -> tuple[predictions.Prediction, ...] | None:
        if not self._replayed.whatif:
            return None
        starts = {self._job_id(record.job): record.start for record in records}
        return predictions.compare(self._copies, starts, min(self._submitted.values()))

    def _look_until(self, due: float) -> None:
        """Draw the cluster until it is time. Return at once if the time has passed."""
        while (left := due - time.monotonic()) > 0:
            if left > LOOK:
                self._draw(self._finished())
            pause(self._supervisor, min(due - time.monotonic(), LOOK))

    def wait(self) -> None:
        """Return when every job has ended, in Postgres too."""
        total = len(self._submitted)
        asked = time.monotonic()
        while True:
            finished = self._finished()
            self._draw(finished)
            if finished >= total or time.monotonic() >= asked + ASK:
                asked = time.monotonic()
                ended = sum(number for state, number in self._states().items() if state in FINAL)
                if ended >= total:
                    return
            pause(self._supervisor, LOOK)

    def _finished(self) -> int:
        return int(self._redis.llen(self._log))

    def _draw(self, finished: int) -> None:
        total = len(self._replayed.jobs)
        seen = overview.read(self._reader, self._engine)
        text = f"{finished}/{total} finished, {seen.waiting} waiting"
        meters = [Meter("jobs", finished, total, text)]
        for worker in seen.workers:
            used, has = worker.allocated.get(CPUS, 0), worker.capacity.get(CPUS, 0)
            meters.append(Meter(worker.name, used, has, f"{format_cpus(used)}/{format_cpus(has)} CPUs"))
        self._meters.show(meters)

    def _ids(self) -> Any:
        jobs = [self._job_id(row) for row in self._submitted]
        return schema.jobs.c.id == func.any(bindparam("ids", jobs, type_=ARRAY(Text)))

    def _states(self) -> dict[str, int]:
        state = schema.jobs.c.state
        with self._engine.connect() as connection:
            rows = connection.execute(select(state, func.count()).where(self._ids()).group_by(state)).all()
        return {row[0]: row[1] for row in rows}

    def _errors(self) -> tuple[tuple[int, str, str], ...]:
        jobs = schema.jobs.c
        failed = (
            select(jobs.id, jobs.state, jobs.error)
            .where(self._ids(), jobs.state != State.SUCCEEDED.value)
            .order_by(jobs.seq)
            .limit(SHOWN_ERRORS)
        )
        with self._engine.connect() as connection:
            rows = connection.execute(failed).all()
        return tuple((int(row[0].rpartition("-")[2]), row[1], row[2] or "") for row in rows)

    def judge(self) -> Report:
        """Measure the replay by the records of the tasks, and check the invariants."""
        seen = [json.loads(entry) for entry in self._redis.lrange(self._log, 0, -1)]
        records = tuple(trace.Record(entry["job"], entry["start"], entry["end"], entry["worker"]) for entry in seen)
        capacities: dict[str, int | None] = {spec.name: spec.cpus for spec in self._replayed.workers}
        for worker in overview.read(self._reader, self._engine).workers:
            capacities.setdefault(worker.name, worker.capacity.get(CPUS, 0))
        asked = {job.row: job.cpus for job in self._replayed.jobs}
        summary = trace.summarise(records, self._submitted)
        peaks = trace.peaks(records, asked)
        averages = trace.averages(records, asked, summary.makespan)
        spec_names = [spec.name for spec in self._replayed.workers]
        lines = [
            WorkerLine(
                name,
                capacities.get(name),
                peaks.get(name, 0),
                averages.get(name, 0),
                sum(r.worker == name for r in records),
            )
            for name in [*spec_names, *sorted(peaks.keys() - set(spec_names))]
        ]
        return Report(
            replayed=self._replayed,
            states=self._states(),
            errors=self._errors(),
            records=records,
            submitted=dict(self._submitted),
            summary=summary,
            workers=tuple(lines),
            doubled=tuple(trace.doubled(records)),
            delay=self._delay,
            invariants=verify.check(self._engine, self._redis),
            predictions=self._predictions(records),
        )

    def revoke(self) -> None:
        """Revoke the jobs that have not run, on servers that others use too."""
        if self._app is not None and self._submitted:
            self._app.control.revoke([self._job_id(row) for row in self._submitted])

    def settle(self) -> None:
        """Write the ledger's latest transitions to Postgres, because the workers that would write them are gone."""
        if self._app is not None:
            stores = platform_of(self._app)
            transition_log.apply_all(stores.engine, stores.ledger)
