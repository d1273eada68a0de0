"""Sources of the routes: reads of the stores; each method returns an object for JSON, and may block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Final

import redis

from celery_capacity.platform.console import job_document
from celery_capacity.platform.console.job_document import JobDocument
from celery_capacity.platform.console.job_ids import whole_ids
from celery_capacity.platform.web import held_jobs, holes, last_hour, missing_workers, runs, task_statistics, workflow
from celery_capacity.platform.web.metrics import reading
from celery_capacity.platform.web.metrics.ended_jobs import EndedJobs
from celery_capacity.platform.web.metrics.exposition import Reads, families
from celery_capacity.platform.web.waiting_groups import Group, WaitingGroups
from celery_capacity.platform.web.workflow import Workflow
from celery_capacity.routing.database import audit, job_lines
from celery_capacity.routing.database.job_lines import Position
from celery_capacity.routing.insert import retries
from celery_capacity.routing.inspect import job_list, overview
from celery_capacity.routing.inspect.job_list import JobFilter
from celery_capacity.routing.inspect.overview import Overview
from celery_capacity.routing.ledger.connection import quick_client
from celery_capacity.routing.model.states import Store
from celery_capacity.routing.store import quarantine
from celery_capacity.workers.process.stores import Stores, platform_of
from celery_capacity.workers.supervision.exposition import exposition

#: Jobs on a page of a list, where a request does not say, and at most.
PAGE: Final = 50
MAX_PAGE: Final = 500
#: Most lines of a job's log in one answer.
MAX_LINES: Final = 1000
#: Seconds of CPU for the reasons of groups that are new on the page, so that a first load takes less than 0.3 s.
NEW_REASONS: Final = 0.15


class Sources:
    """Reads of both stores. `app`: returns the Celery app whose backend has the results. It is slow to import."""

    def __init__(self, stores: Stores, app: Callable[[], Any]) -> None:
        self.stores = stores
        self._app = app
        self._ended = EndedJobs()
        self._reads: Counter[Store] = Counter()
        self._groups = WaitingGroups(NEW_REASONS)

    @cached_property
    def client(self) -> redis.Redis:
        """Return a client of Redis that gives up soon."""
        return quick_client(self.stores.redis)

    def acting(self) -> tuple[Any, Stores]:
        """Return the app and its stores, for an action: submissions wait in the app's own stores."""
        app = self._app()
        return app, platform_of(app)

    def audit(self, limit: int, before: int | None) -> dict[str, Any]:
        """Return actions of operators, the newest first, and the cursor of the next page."""
        with self.stores.engine.connect() as connection:
            entries = audit.newest(connection, limit, audit.LAST if before is None else before)
        cursor = str(entries[-1].seq) if len(entries) == limit else None
        return {"actions": [entry.to_json() for entry in entries], "next_cursor": cursor}

    def action(self, seq: int) -> dict[str, Any] | None:
        """Return one action; None if there is none."""
        with self.stores.engine.connect() as connection:
            entry = audit.entry(connection, seq)
        return None if entry is None else entry.to_json()

    def quarantine(self, limit: int, before: int | None) -> dict[str, Any]:
        """Return messages that were set aside, the newest first, and the cursor of the next page."""
        with self.stores.engine.connect() as connection:
            messages = quarantine.newest(connection, limit, audit.LAST if before is None else before)
        return {"messages": messages, "next_cursor": str(messages[-1]["id"]) if len(messages) == limit else None}

    def overview(self) -> Overview:
        seen = overview.read(self.client, self.stores.engine, self.stores.settings.worker_ttl)
        self._reads[seen.source] += 1
        return seen

    def dashboard(self) -> dict[str, Any]:
        """Return the object of `cluster --json`."""
        return self.overview().to_json()

    def metrics(self) -> bytes:
        """Return the metrics for Prometheus."""
        seen = reading.read(self.overview, self.client, self.stores.engine, self._ended)
        reads = Reads(self._reads[Store.LEDGER], self._reads[Store.POSTGRES])
        return exposition(families(seen, reads))

    def missing(self) -> list[dict[str, Any]]:
        """Return the workers that are lost, or without a heartbeat."""
        with self.stores.engine.connect() as connection:
            return missing_workers.read(connection, self.stores.settings.worker_ttl)

    def held(self, workers: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """Return the jobs that each of these workers holds."""
        with self.stores.engine.connect() as connection:
            return held_jobs.read(connection, workers)

    def groups(self) -> list[Group]:
        with self.stores.engine.connect() as connection:
            return self._groups.read(connection, self.client, self.stores.settings)

    def tasks(self) -> dict[str, Any]:
        with self.stores.engine.connect() as connection:
            return task_statistics.read(connection)

    def runs(self, since: datetime, until: datetime, limit: int) -> dict[str, Any]:
        """Return the attempts in a stretch of time."""
        with self.stores.engine.connect() as connection:
            return runs.read_document(connection, since, until, limit)

    def last_hour(self) -> dict[str, Any]:
        """Return the last hour of the cluster, minute by minute."""
        seen = self.dashboard()
        with self.stores.engine.connect() as connection:
            return last_hour.read(connection, datetime.now(UTC), seen)

    def hole(self, worker: str, at: datetime) -> dict[str, Any]:
        """Return what was free on a worker at a moment, and what waited then."""
        with self.stores.engine.connect() as connection:
            return holes.read_document(connection, worker, at)

    def jobs(self, wanted: JobFilter, limit: int, before: int | None) -> dict[str, Any]:
        """Return a page of jobs, each as in `jobs --json`, and the cursor of the next page."""
        with job_list.snapshot(self.stores.engine) as connection:
            listed = job_list.newest(connection, wanted, limit, before)
        cursor = None if listed.next_before is None else str(listed.next_before)
        return {"jobs": [line.to_json() for line in listed.lines], "next_cursor": cursor}

    def ids(self, wanted: JobFilter, limit: int, *, retried: bool) -> list[str]:
        """Return the ids of jobs that the filter selects, the oldest first.

        `retried`: also those with a retry. They count towards the limit in any case.
        """
        with job_list.snapshot(self.stores.engine) as connection:
            ids = [str(line["id"]) for line in job_list.newest(connection, wanted, limit).lines]
            left_out = set() if retried or len(ids) == limit else retries.retried(connection, ids)
        return [job for job in reversed(ids) if job not in left_out]

    def job(self, job_id: str) -> JobDocument:
        """Return one job, with why it waits. Raises `UnknownJob`."""
        return job_document.read(self.stores, self._app, job_id)

    def whole_id(self, job_id: str) -> str:
        """Return the id of the job that an id, or the beginning of one, names. Raises `UnknownJob`."""
        (job,) = whole_ids(self.stores.engine, [job_id])
        return job

    def workflow(self, job: str) -> Workflow:
        """Return the parents, the children and the further steps of a job."""
        with self.stores.engine.connect() as connection:
            return workflow.read(connection, job)

    def logs(self, job_id: str, most: int, attempt: int | None = None, after: Position | None = None) -> dict[str, Any]:
        """Return lines of a job's own log: the newest, or those that follow `after`. Raises `UnknownJob`."""
        job = self.whole_id(job_id)
        with self.stores.engine.connect() as connection:
            lines = job_lines.read(connection, job, most, attempt, after)
        cursor = ".".join(map(str, lines[-1].position)) if lines else None
        return {"lines": [line.to_json() for line in lines], "cursor": cursor}
