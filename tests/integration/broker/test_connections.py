"""Connections that break while work flows: each answer on its way is lost, and nothing else."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from celery_capacity import NotAccepted, OutcomeUnknown
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until
from tests.tasks.work import peaks, read, starts

WORK = "tests.tasks.work"
JOBS = 120


def break_redis(platform: Platform) -> int:
    """Kill all connections to this test's Redis database but the test's own, and return their number."""
    client = platform.redis
    mine, database = client.client_id(), str(client.connection_pool.connection_kwargs["db"])
    others: Any = [
        client_entry
        for client_entry in client.client_list()
        if client_entry["db"] == database and int(client_entry["id"]) != mine
    ]
    for entry in others:
        client.client_kill_filter(_id=entry["id"])
    return len(others)


def break_postgres(platform: Platform) -> int:
    """End all sessions of this test's Postgres database but the test's own, and return their number."""
    with platform.engine.connect() as connection:
        ended = connection.execute(
            text(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
        return int(ended.scalar_one())


@pytest.mark.long
@pytest.mark.parametrize("break_all", [break_redis, break_postgres])
def test_work_goes_on_and_every_job_runs_once(
    platform: Platform, submitter: Submitter, tmp_path: Path, break_all: Callable[[Platform], int]
) -> None:
    platform.environment["PLATFORM_IMPORTS"] += f",{WORK}"
    platform.worker("a", 4, "threads")
    platform.worker("b", 2, "prefork")
    trace = tmp_path / "trace"
    long = submitter.send(f"{WORK}.work", str(trace), "long", 3.0, 1000, cpus=1)
    until(lambda: read(trace), "it runs")
    sent: dict[str, str] = {}
    refused, unknown = set(), set()

    def submit() -> None:
        for number in range(JOBS):
            label = str(number)
            try:
                arguments = (str(trace), label, 0.03, 1000)
                sent[label] = submitter.send(f"{WORK}.work", *arguments, cpus=1, task_id=f"job-{number}")
            except NotAccepted:
                refused.add(label)
            except OutcomeUnknown as error:
                assert error.job_id == f"job-{number}"
                unknown.add(label)

    thread = threading.Thread(target=submit)
    thread.start()
    for part in range(1, 5):
        until(lambda: len(read(trace)) >= part * JOBS * 2 // 6, lambda: f"work flows: {len(read(trace))}")  # noqa: B023
        # Connections that broke a moment ago may not have been made anew.
        until(lambda: break_all(platform) > 0, "connections to break")
    thread.join()
    for label in unknown:
        if submitter.row(f"job-{label}") is not None:
            sent[label] = f"job-{label}"
    assert all(submitter.row(f"job-{label}") is None for label in refused)
    rows = [submitter.ended(job) for job in sent.values()]
    assert [row.error for row in rows if row.state != "succeeded"] == []
    # The job that ran all the time was not touched.
    assert submitter.ended(long).attempt == 1
    assert submitter.outcomes(long) == ["succeeded"]
    events = read(trace)
    assert starts(events) == dict.fromkeys(["long", *sent], 1)
    assert all(most <= {"a": 4000, "b": 2000}[worker] for worker, most in peaks(events).items())
    until(lambda: submitter.allocated_cpus() == "0", "all is given back")
    assert len(sent) > JOBS / 2


def test_looks_at_a_result_backend_leave_no_connection(submitter: Submitter) -> None:
    """A single successful look ends an outage. A program with many outages must not run out of file descriptors."""

    def descriptors() -> int:
        return len(os.listdir("/dev/fd"))

    look: Any = submitter.app.backend._ping
    look()
    before = descriptors()
    # The cyclic garbage collector would close some of the connections at some time.
    gc.disable()
    try:
        for _ in range(5):
            look()
        assert descriptors() == before
    finally:
        gc.enable()
