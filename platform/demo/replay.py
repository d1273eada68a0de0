"""The demo: a job trace replayed by real workers, measured by its tasks and judged by the invariants.

What one replay makes (workers, a Redis list of records, and a private pair of servers unless URLs are given)
it takes away again. The list has one entry for each run of a task, so the peaks and times are what happened,
and not what the ledger says of itself.
"""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import redis
from sqlalchemy import ARRAY, Engine, Text, bindparam, func, select

from celery_capacity import create_app, migrations
from celery_capacity.platform.console.terminal import Meter, Meters
from celery_capacity.platform.demo import trace
from celery_capacity.platform.embedded import servers
from celery_capacity.platform.processes.launch import WorkerSpec, await_ready, pause, start_worker
from celery_capacity.platform.processes.supervisor import COLD, WARM, Family, Step
from celery_capacity.platform.tasks import SLEEP
from celery_capacity.routing.config.secret_files import SUFFIX
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database import schema
from celery_capacity.routing.inspect import overview, verify
from celery_capacity.routing.ledger.connection import connect, quick_client
from celery_capacity.routing.model.amounts import CPUS, cpus_number, format_cpus
from celery_capacity.routing.model.states import FINAL, State
from celery_capacity.routing.recovery import transition_log
from celery_capacity.workers.app.install import platform_of
from celery_capacity.workers.process.stores import make_engine

__all__ = ["WORKERS", "Replayed", "Report", "WorkerLine", "replay"]

#: The workers of a demo that names none.
WORKERS = (WorkerSpec("worker-01", 72_000), WorkerSpec("worker-02", 16_000))

#: Seconds between two looks at the cluster while the trace runs.
LOOK = 0.25

#: Seconds between two questions to Postgres whether jobs ended without a record.
ASK = 2.0

#: Most failed jobs whose errors are shown.
SHOWN_ERRORS = 5


@dataclass(frozen=True)
class Replayed:
    """What to replay. `scale`: how many times faster than the trace."""

    name: str
    jobs: tuple[trace.Job, ...]
    scale: float
    workers: tuple[WorkerSpec, ...]


@dataclass(frozen=True)
class WorkerLine:
    """Measured on one worker; millicores. `cpus` is None for another's worker that left."""

    name: str
    cpus: int | None
    peak: int
    jobs: int

    @property
    def within(self) -> bool:
        return self.cpus is not None and self.peak <= self.cpus


@dataclass(frozen=True)
class Report:
    """A finished replay. `states` counts the jobs by state; `errors`: (row, state, text) of failed ones."""

    replayed: Replayed
    states: Mapping[str, int]
    errors: tuple[tuple[int, str, str], ...]
    records: tuple[trace.Record, ...]
    submitted: Mapping[int, float]
    summary: trace.Summary
    workers: tuple[WorkerLine, ...]
    doubled: tuple[int, ...]
    delay: float  #: seconds that the latest submission came after its time
    invariants: verify.Report

    @property
    def ok(self) -> bool:
        """All jobs ran once and to their end, no worker held more than it has, and the invariants hold."""
        return (
            self.states.get(State.SUCCEEDED, 0) == len(self.replayed.jobs) == len(self.records)
            and not self.doubled
            and all(worker.within for worker in self.workers)
            and self.invariants.holds
        )

    def to_json(self) -> dict[str, Any]:
        """The object that `demo --json` prints; seconds and CPUs."""
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
                    "jobs": worker.jobs,
                }
                for worker in self.workers
            ],
            "run_twice": list(self.doubled),
            "errors": [{"job": row, "state": state, "error": text} for row, state, text in self.errors],
            "invariants": self.invariants.to_json(),
            "ok": self.ok,
        }


def replay(replayed: Replayed, settings: Settings, environ: Mapping[str, str], meters: Meters, say: Any) -> Report:
    """Start the workers, submit the jobs at their times, wait for the last, and judge. `say` gets talk.

    Raises Interrupted, ChildDied, NotReady, and what the servers and the submission raise; nothing of it is
    left running then. With URLs given, jobs that have not run are revoked.
    """
    family = Family(orphans=signal.SIGKILL)  # their servers may be gone too: nothing to end warm with
    with closing(family), family.interruptible(), ExitStack() as stack:
        private = settings.redis_url is None
        settings = _with_servers(settings, stack)
        say(servers.describe(settings))
        own = _environ(environ, settings, private)
        stack.enter_context(_environment(own))
        run = _Run(replayed, settings, family, meters)
        stack.callback(run.close)
        try:
            say("Starting " + ", ".join(f"{w.name} with {format_cpus(w.cpus)} CPUs" for w in replayed.workers))
            await_ready(
                family,
                [start_worker(family, w, own, pool="threads", slots=w.slots) for w in replayed.workers],
            )
            run.submit()
            run.wait()
            report = run.judge()
        except BaseException:
            if private:
                family.end(family.children, (Step(COLD.signum, 3.0),))
            else:
                say("Taking back what has not run; what runs comes to its end (Ctrl-C again breaks it off).")
                run.revoke()
                family.end(family.children, (WARM, COLD))
                run.settle()
            raise
        family.end(family.children, (replace(WARM, patience=20.0), COLD))
        return report


def _with_servers(settings: Settings, stack: ExitStack) -> Settings:
    """The given servers, with tables where there were none; else a private pair while `stack` lasts."""
    if settings.redis_url is None or settings.database_url is None:
        pair = stack.enter_context(servers.private_pair())
        return settings.with_urls(pair.redis_url, pair.database_url)
    if migrations.current(settings.database_url) is None:
        migrations.upgrade(settings.database_url)
    migrations.check(settings.database_url)
    return settings


def _environ(environ: Mapping[str, str], settings: Settings, private: bool) -> dict[str, str]:
    """The environment of workers and submitter. On a private pair nothing leads to other servers."""
    if not private:
        return dict(environ)
    urls = {"REDIS_URL": str(settings.redis_url), "DATABASE_URL": str(settings.database_url)}
    others = ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND")
    left_out = {*others, *(name + SUFFIX for name in others)}
    return {name: value for name, value in environ.items() if name not in left_out} | urls


@contextmanager
def _environment(environ: Mapping[str, str]) -> Iterator[None]:
    """Make this the environment for a while: `create_app` reads its URLs there, as for any user."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Run:
    """The jobs of one replay on their way."""

    def __init__(
        self,
        replayed: Replayed,
        settings: Settings,
        family: Family,
        meters: Meters,
    ) -> None:
        self._replayed = replayed
        self._family = family
        self._meters = meters
        self._id = f"demo-{uuid.uuid4().hex[:12]}"
        self._log = f"demo:log:{self._id}"
        self._redis: redis.Redis = connect(str(settings.redis_url), settings.store_timeout)
        self._reader = quick_client(self._redis)
        self._engine: Engine = make_engine(str(settings.database_url))
        self._submitted: dict[int, float] = {}
        self._delay = 0.0
        self._app: Any = None

    def close(self) -> None:
        """Take away the records; the servers themselves may be gone."""
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
            )
            self._delay = max(self._delay, time.monotonic() - due)

    def _look_until(self, due: float) -> None:
        """Draw the cluster until it is time; returns at once where it is late."""
        while (left := due - time.monotonic()) > 0:
            if left > LOOK:
                self._draw(self._finished())
            pause(self._family, min(due - time.monotonic(), LOOK))

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
            pause(self._family, LOOK)

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
        """Measure by the records of the tasks, and ask the invariants."""
        seen = [json.loads(entry) for entry in self._redis.lrange(self._log, 0, -1)]
        records = tuple(trace.Record(one["job"], one["start"], one["end"], one["worker"]) for one in seen)
        capacities: dict[str, int | None] = {spec.name: spec.cpus for spec in self._replayed.workers}
        for worker in overview.read(self._reader, self._engine).workers:
            capacities.setdefault(worker.name, worker.capacity.get(CPUS, 0))
        peaks = trace.peaks(records, {job.row: job.cpus for job in self._replayed.jobs})
        own = [spec.name for spec in self._replayed.workers]
        lines = [
            WorkerLine(name, capacities.get(name), peaks.get(name, 0), sum(r.worker == name for r in records))
            for name in [*own, *sorted(peaks.keys() - set(own))]
        ]
        return Report(
            replayed=self._replayed,
            states=self._states(),
            errors=self._errors(),
            records=records,
            submitted=dict(self._submitted),
            summary=trace.summarise(records, self._submitted),
            workers=tuple(lines),
            doubled=tuple(trace.doubled(records)),
            delay=self._delay,
            invariants=verify.check(self._engine, self._redis),
        )

    def revoke(self) -> None:
        """Take back what has not run, on servers that others use too."""
        if self._app is not None and self._submitted:
            self._app.control.revoke([self._job_id(row) for row in self._submitted])

    def settle(self) -> None:
        """Write to Postgres what the ledger did since: the workers that would have are gone."""
        if self._app is not None:
            stores = platform_of(self._app)
            transition_log.apply_all(stores.engine, stores.ledger)
