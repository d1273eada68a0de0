"""The insert of a retry with its link: one transaction, once for each job."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from dataclasses import replace

from sqlalchemy import Connection

from celery_capacity.routing.insert import retries
from celery_capacity.routing.insert.retries import Repeated
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.store import archive, queries
from celery_capacity.workers.process.stores import transactions
from tests.fixtures.stores.authorities import Authority
from tests.fixtures.stores.staged import MESSAGE
from tests.fixtures.waiting import until

RETRY = NewJob("retry", "task", Request.of({"cpus": 1000}).shape, MESSAGE, root_id="retry")


def failed(authority: Authority) -> str:
    authority.worker("a", cpus=4000)
    job = authority.submit(cpus=1000)
    assert authority.starts("a") == [job]
    authority.end(job, "failed")
    return job


def seq_of(authority: Authority, job: str) -> int:
    return int(authority.row(job).seq)


def insert(
    connection: Connection, authority: Authority, job: str, new: NewJob = RETRY, again: bool = False
) -> Repeated:
    return retries.insert_retry(connection, new, job, seq_of(authority, job), again)


def begin(authority: Authority) -> AbstractContextManager[Connection]:
    return transactions(authority.stores.engine).begin()


def exists(authority: Authority, job: str) -> bool:
    with authority.stage.engine.connect() as connection:
        return queries.find(connection, job) is not None


def locked(authority: Authority) -> bool:
    """Return True if a session of this database waits for a lock."""
    waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"
    with authority.stage.engine.connect() as connection:
        return bool(connection.exec_driver_sql(waits).scalar_one())


def test_retry_is_linked_in_both_directions(authority: Authority) -> None:
    job = failed(authority)
    with begin(authority) as connection:
        repeated = insert(connection, authority, job)
    assert repeated.inserted is not None
    assert repeated.inserted.authority == authority.name
    with authority.stage.engine.connect() as connection:
        old, new = queries.find(connection, job), queries.find(connection, "retry")
        assert old is not None
        assert new is not None
        assert (old.job["retry_of"], list(old.job["retried_as"])) == (None, ["retry"])
        assert (new.job["retry_of"], list(new.job["retried_as"])) == (job, [])
        original = retries.read_original(connection, job)
        assert original is not None
        assert (original.retried_as, original.message) == ("retry", MESSAGE)


def test_rollback_leaves_neither_job_nor_link(authority: Authority) -> None:
    job = failed(authority)
    with transactions(authority.stores.engine).connect() as connection:
        assert insert(connection, authority, job).inserted is not None
        connection.rollback()
    assert exists(authority, "retry") is False
    with begin(authority) as connection:
        assert insert(connection, authority, job).inserted is not None


def test_second_retry_is_refused_unless_it_is_meant(authority: Authority) -> None:
    job = failed(authority)
    other = replace(RETRY, id="other", root_id="other")
    with begin(authority) as connection:
        insert(connection, authority, job)
        assert insert(connection, authority, job, other) == Repeated(None, "retry")
        assert insert(connection, authority, job, other, again=True).inserted is not None
    with authority.stage.engine.connect() as connection:
        file = queries.find(connection, job)
        assert file is not None
        assert list(file.job["retried_as"]) == ["retry", "other"]


def test_of_two_callers_at_once_one_makes_the_retry(authority: Authority) -> None:
    job = failed(authority)
    results = []
    other = replace(RETRY, id="other", root_id="other")

    def second() -> None:
        with begin(authority) as connection:
            results.append(insert(connection, authority, job, other))

    thread = threading.Thread(target=second)
    with begin(authority) as connection:
        assert insert(connection, authority, job).inserted is not None
        thread.start()
        until(lambda: locked(authority), "the second one waits")
        assert results == []
    thread.join()
    assert results == [Repeated(None, "retry")]
    assert exists(authority, "other") is False


def test_retry_that_puts_itself_back_keeps_its_link_and_its_place(authority: Authority) -> None:
    job = failed(authority)
    other = replace(RETRY, id="other", root_id="other")
    for new, again in ((RETRY, False), (other, True)):
        with begin(authority) as connection:
            insert(connection, authority, job, new, again)
    seq = seq_of(authority, "retry")
    authority.bring_in("retry")
    assert authority.starts("a")[:1] == ["retry"]
    assert authority.end("retry", "requeued") == "released"
    assert seq_of(authority, "retry") > seq
    with authority.stage.engine.connect() as connection:
        old, new_file = queries.find(connection, job), queries.find(connection, "retry")
        assert old is not None
        assert new_file is not None
        assert (new_file.job["retry_of"], list(old.job["retried_as"])) == (job, ["retry", "other"])
        original = retries.read_original(connection, job)
        assert original is not None
        assert original.retried_as == "other"
    with begin(authority) as connection:
        assert insert(connection, authority, job) == Repeated(None, "other")


def test_job_that_has_not_ended_gets_no_retry(authority: Authority) -> None:
    authority.worker("a", cpus=4000)
    job = authority.submit(cpus=1000)
    with begin(authority) as connection:
        assert insert(connection, authority, job) == Repeated(None)
    assert exists(authority, "retry") is False


def test_links_outlive_the_archiving_of_both_jobs(authority: Authority) -> None:
    job = failed(authority)
    with begin(authority) as connection:
        insert(connection, authority, job)
    authority.stage.sql("UPDATE jobs SET outbox = NULL")
    with authority.stage.engine.begin() as connection:
        assert archive.archive_finished(connection, 0, 10) == 1
        assert retries.read_original(connection, job) is None
        assert retries.is_archived(connection, job)
        file = queries.find(connection, job)
    assert file is not None
    assert list(file.job["retried_as"]) == ["retry"]


def test_failed_jobs_are_those_without_a_retry(authority: Authority) -> None:
    job = failed(authority)
    with begin(authority) as connection:
        assert retries.failed_jobs(connection, None, None, again=False) == [job]
        assert retries.failed_jobs(connection, "task", 60.0, again=False) == [job]
        assert retries.failed_jobs(connection, "other", None, again=False) == []
        assert retries.failed_jobs(connection, None, 0.0, again=False) == []
        insert(connection, authority, job)
        assert retries.failed_jobs(connection, None, None, again=False) == []
        assert retries.failed_jobs(connection, None, None, again=True) == [job]
