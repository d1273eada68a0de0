"""The short way into Postgres writes the rows that the long way does, and survives what may come in between."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, NullPool, create_engine, text

from celery_capacity.routing.insert import single
from celery_capacity.routing.insert.inserter import Inserter
from celery_capacity.routing.model.job import Constraints, Existing, NewJob
from celery_capacity.routing.model.request import Request
from tests.fixtures.waiting import until

#: Ends of the jobs' ids.
NUMBERS = itertools.count()
WHEN = datetime(2100, 1, 1, tzinfo=UTC)
JOBS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["a.task", "é%s$1"]),
        "shape": st.sampled_from([Request.of({"cpus": 1000}).shape, Request.of({"memory": 3, "gpus": 2}).shape]),
        "message": st.binary(max_size=8),
        "priority": st.integers(0, 9),
        "declared": st.booleans(),
        "queue": st.sampled_from(["celery", "mail"]),
        "root_id": st.sampled_from(["itself", "itself", None, "another"]),
    },
    # Each option is a field that makes a job no longer simple.
    optional={
        "retries": st.just(1),
        "nesting": st.just(1),
        "rerun": st.just(False),
        "parent_id": st.just("another"),
        "replaces": st.just("another"),
        "due_at": st.just(WHEN),
        "expires_at": st.just(WHEN),
        "stamps": st.just('{"by": ["x"]}'),
    },
)
SIMPLE = st.fixed_dictionaries({"name": st.just("a.task"), "root_id": st.just("itself"), "message": st.binary()}).map(
    lambda fields: {**fields, "shape": Request.of({"cpus": 500}).shape}
)


@pytest.fixture
def inserter(engine: Engine) -> Iterator[Inserter]:
    unpooled = create_engine(engine.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    made = Inserter(unpooled, engine)
    yield made
    made.close()


def job_of(fields: dict[str, Any]) -> NewJob:
    job = NewJob(id=f"job-{next(NUMBERS)}", **fields)
    return replace(job, root_id=job.id) if job.root_id == "itself" else job


@pytest.mark.parametrize("often", [1, 2])
def test_a_row_is_the_same_by_either_way(
    engine: Engine, inserter: Inserter, monkeypatch: pytest.MonkeyPatch, often: int
) -> None:
    # Every kind of job is common, or only a kind that came before. A kind that comes too late is not common, since
    # three kinds are counted.
    monkeypatch.setattr("celery_capacity.routing.insert.inserter._COMMON", often)
    monkeypatch.setattr("celery_capacity.routing.insert.inserter._COUNTED", 3)

    @given(st.one_of(JOBS, SIMPLE))
    def check(fields: dict[str, Any]) -> None:
        short, long = job_of(fields), job_of(fields)
        inserted = inserter.insert(short)
        with engine.connect() as connection:
            other = single.insert_job(connection.execution_options(isolation_level="AUTOCOMMIT"), long)
            rows = [
                {**connection.execute(text("SELECT * FROM jobs WHERE id = :id"), {"id": job.id}).one()._mapping}
                for job in (short, long)
            ]
        assert replace(inserted, seq=None) == replace(other, seq=None)
        for row, job in zip(rows, (short, long), strict=True):
            row["root_id"] = "itself" if row["root_id"] == job.id else row["root_id"]
            row["message"] = bytes(row["message"])
            del row["id"], row["seq"], row["submitted_at"]
        assert rows[0] == rows[1]
        again = inserter.insert(short)
        waits = short.due_at is not None
        assert (again.seq, again.existing) == (None, Existing.IGNORED if waits else Existing.ACCEPTED)

    check()


def test_inserter_prepares_a_statement_for_each_common_kind_of_job(
    engine: Engine, inserter: Inserter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("celery_capacity.routing.insert.inserter._MAX_KINDS", 2)
    kinds = [
        {"name": name, "shape": Request.of({"cpus": 500}).shape, "message": b"\\'", "root_id": "itself"}
        for name in ("it's", "100% \\ done", "a third")
    ]

    def submitted() -> list[Any]:
        jobs = [job_of(fields) for fields in kinds for _ in range(10)]
        assert all(inserter.insert(job).seq is not None for job in jobs)
        with engine.connect() as connection:
            ids = {"ids": [job.id for job in jobs]}
            names = connection.execute(text("SELECT name FROM jobs WHERE id = ANY(:ids)"), ids)
            assert sorted(names.scalars()) == sorted(job.name for job in jobs)
        kept: Any = inserter._connection
        with kept.cursor() as cursor:
            cursor.execute("SELECT name FROM pg_prepared_statements ORDER BY name")
            return [row[0].removeprefix("celery_capacity_insert_").rpartition("_")[0] for row in cursor]

    assert submitted() == ["own_job", "own_job", "simple_job"]
    inserter.close()
    assert submitted() == ["own_job", "own_job", "simple_job"]
    # A session that knows none of them: a pooler's.
    kept: Any = inserter._connection
    with kept.cursor() as cursor:
        cursor.execute("DEALLOCATE ALL")
    assert submitted() == ["own_job", "own_job", "simple_job"]


def test_inserters_whose_sessions_a_pooler_swaps_write_their_own_rows(engine: Engine) -> None:
    made = [Inserter(create_engine(engine.url, isolation_level="AUTOCOMMIT", poolclass=NullPool), engine) for _ in "ab"]
    sent: list[NewJob] = []

    def send() -> None:
        for name, inserter in zip(("one", "another"), made, strict=True):
            for _ in range(10):
                job = job_of(
                    {"name": name, "shape": Request.of({"cpus": 500}).shape, "message": b"m", "root_id": "itself"}
                )
                assert inserter.insert(job).seq is not None
                sent.append(job)

    try:
        send()
        first, second = (inserter._connection for inserter in made)
        assert first is not None and second is not None
        first.dbapi_connection, second.dbapi_connection = second.dbapi_connection, first.dbapi_connection  # type: ignore[misc]
        send()
        # A new connection gets a session of before, too.
        first.info.clear()
        send()
    finally:
        for inserter in made:
            inserter.close()
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT id, name FROM jobs WHERE id = ANY(:ids)"), {"ids": [j.id for j in sent]})
        assert dict(rows.all()) == {job.id: job.name for job in sent}


class Masked(str):
    """A name that does not show itself."""

    def __repr__(self) -> str:
        return "'***'"


def test_name_of_a_statement_differs_with_its_text(engine: Engine, inserter: Inserter) -> None:
    shape = Request.of({"cpus": 500}).shape
    jobs = [
        job_of({"name": Masked(name), "shape": shape, "message": b"m", "root_id": "itself"})
        for _ in range(20)
        for name in ("one", "two")
    ]
    assert all(inserter.insert(job).seq is not None for job in jobs)
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT id, name FROM jobs WHERE id = ANY(:ids)"), {"ids": [j.id for j in jobs]})
        assert {row.id: row.name for row in rows} == {job.id: str(job.name) for job in jobs}


@pytest.mark.parametrize("key", ["", "only one"])
@pytest.mark.parametrize("known", ["by the session alone", "by us alone"])
def test_a_job_in_a_transaction_needs_no_prepared_statement(engine: Engine, key: str, known: str) -> None:
    fields = {"name": "a.task", "shape": Request.of({"cpus": 500}).shape, "message": b"m"}
    with create_engine(engine.url, isolation_level="AUTOCOMMIT", poolclass=NullPool).connect() as connection:
        assert single.insert_job(connection, job_of(fields)).seq is not None
        if known == "by us alone":
            connection.exec_driver_sql("DEALLOCATE ALL")
        else:
            connection.info.pop(single.BY_ANYBODY.name)
        constraints = Constraints(key=f"{key} {known}") if key else None
        assert single.insert_job(connection, job_of({**fields, "constraints": constraints})).seq is not None


class Interrupted(Exception):
    """Exception such as a time limit raises, at any point in the thread."""


def interrupt(*_: Any) -> NoReturn:
    raise Interrupted


def test_a_signal_while_a_statement_is_prepared_spoils_one_job(engine: Engine, inserter: Inserter) -> None:
    job = job_of({"name": "a.task", "shape": Request.of({"cpus": 500}).shape, "message": b"", "root_id": "itself"})
    before = signal.signal(signal.SIGUSR1, interrupt)
    with engine.connect() as locker:
        locker.execute(text("LOCK TABLE jobs"))
        waits = text("SELECT count(*) FROM pg_locks WHERE relation = 'jobs'::regclass AND NOT granted")

        def signal_meanwhile() -> None:
            until(lambda: locker.execute(waits).scalar_one(), "the statement waits for the table")
            os.kill(os.getpid(), signal.SIGUSR1)
            locker.rollback()

        thread = threading.Thread(target=signal_meanwhile)
        thread.start()
        try:
            with pytest.raises(Interrupted):
                inserter.insert(job)
        finally:
            thread.join()
            signal.signal(signal.SIGUSR1, before)
    assert inserter.insert(job).seq is not None
