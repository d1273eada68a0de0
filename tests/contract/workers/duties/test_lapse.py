"""Lost workers: one that cannot be taken back now does not keep the others, and live workers are left alone."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.job import Publisher
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.recovery import reclaim
from celery_capacity.routing.recovery.reconcile import reconcile
from celery_capacity.routing.store import fencing
from celery_capacity.workers.duties import fallback, lapse
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.supervision.window import Window
from tests.fixtures.stores.staged import Stage
from tests.fixtures.waiting import until


def running(stage: Stage, worker: str) -> str:
    stage.worker(worker, cpus=1000)
    job = stage.submit(cpus=1000)
    stage.start(job)
    return job


def test_a_lost_worker_whose_commit_hangs_does_not_keep_the_jobs_of_others(
    engine: Engine, stage: Stage, stores: Stores
) -> None:
    """Its machine went away, or it was stopped, between the guarded statement and the commit: the row is locked."""
    hangs, other = running(stage, "a"), running(stage, "b")
    for worker in ("a", "b"):
        stage.ledger.expire_lease(worker, f"{worker}-life")
    with engine.connect() as connection, connection.begin():
        assert fencing.commit(connection, Publisher(hangs, Token(stage.ledger.epoch, 1), "a-life"))
        assert lapse.run_once(None, stores)["taken_back"] == 1
        stage.apply()
        assert stage.row(other).state == "waiting"
    assert lapse.run_once(None, stores) == {"closed": 0, "lost": 1, "taken_back": 0}
    assert stage.row(hangs).state == "succeeded"


def test_lost_worker_whose_row_is_refused_does_not_keep_the_jobs_of_others(stage: Stage, stores: Stores) -> None:
    """A row may be damaged, for example, so that Postgres takes no write of it."""
    refused, other = running(stage, "a"), running(stage, "b")
    for worker in ("a", "b"):
        stage.ledger.expire_lease(worker, f"{worker}-life")
    stage.sql(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'damaged' "
        "USING ERRCODE = 'XX001'; END $$"
    )
    stage.sql(
        f"CREATE TRIGGER refuse BEFORE UPDATE ON jobs FOR EACH ROW WHEN (NEW.id = '{refused}') "
        "EXECUTE FUNCTION refuse()"
    )
    assert lapse.run_once(None, stores)["taken_back"] == 1
    stage.sql("DROP TRIGGER refuse ON jobs")
    stage.apply()
    assert stage.row(other).state == "waiting"
    assert lapse.run_once(None, stores)["taken_back"] == 1
    stage.apply()
    assert stage.row(refused).state == "waiting"


def test_server_ends_a_commit_that_hangs_for_too_long(engine: Engine, stage: Stage) -> None:
    job = running(stage, "a")
    with engine.connect() as connection:
        assert fencing.commit(connection, Publisher(job, Token(stage.ledger.epoch, 1), "a-life"), hangs_after=0.05)
        until(lambda: takes(stage, job), "the row is free")
        with pytest.raises(OperationalError):
            connection.execute(text("SELECT 1"))
    assert stage.row(job).state == "running"


def takes(stage: Stage, job: str) -> bool:
    with stage.engine.connect() as connection:
        query = text("SELECT count(*) FROM (SELECT FROM jobs WHERE id = :id FOR UPDATE SKIP LOCKED) AS free")
        return bool(connection.execute(query, {"id": job}).scalar_one())


def status(stage: Stage, incarnation: str) -> str:
    with stage.engine.connect() as connection:
        query = text("SELECT status FROM workers WHERE incarnation = :incarnation")
        return str(connection.execute(query, {"incarnation": incarnation}).scalar_one())


def test_a_life_that_is_over_is_not_revived_by_the_next_one_of_its_name(stage: Stage) -> None:
    """Two processes take the same life back; the slower one meets a worker that has the name by then."""
    running(stage, "a")
    stage.sql("UPDATE workers SET incarnation = 'a-former', name = 'a', status = 'lost'")
    stage.worker("a", cpus=1000)
    reclaim.take_back(stage.engine, stage.ledger, "a", "a-former", 0)
    assert (status(stage, "a-former"), status(stage, "a-life")) == ("lost", "ready")


def test_claim_of_a_worker_that_was_nearly_given_up_stands(stage: Stage) -> None:
    """The worker woke up with a message in its queue, at the moment in which its jobs were about to be taken back."""
    stage.worker("a", cpus=1000)
    job = stage.submit(cpus=1000)
    assert reclaim.take_back(stage.engine, stage.ledger, "a", "a-life", 0).verdict == "alive"
    stage.start(job)
    assert reconcile(stage.engine, stage.ledger).to_json()["kinds"] == {}
    stage.end(job)
    assert (stage.row(job).state, stage.row(job).attempt) == ("succeeded", 1)


@pytest.mark.parametrize("claimed", [False, True])
def test_job_whose_former_book_is_missing_does_not_stay_with_the_new_life(stage: Stage, claimed: bool) -> None:
    """Keys were deleted while the worker was dead: the book of its next life says nothing of the former one."""
    stage.worker("a", cpus=1000)
    job = stage.submit(cpus=1000)
    if claimed:
        stage.start(job)
    stage.redis.delete(keys.book("a"))
    stage.redis.zrem(keys.LEASES, "a")
    stage.worker("a", cpus=1000, life="next")
    reconcile(stage.engine, stage.ledger)
    stage.apply()
    row = stage.row(job)
    assert (row.state, row.incarnation, row.attempt) == ("admitted", "a-next", 2)
    assert stage.redis.hget(keys.book("a"), "a.cpus") == b"1000"


def test_worker_is_given_up_by_a_watcher_of_its_silence_not_by_a_clock(stage: Stage, stores: Stores) -> None:
    """While Postgres decides its clock tells who is silent; set forward, it makes all workers silent at once."""
    dead, lives = running(stage, "a"), running(stage, "b")
    stage.sql("UPDATE authority SET authority = 'postgres'")
    window = Window(3600.0)
    window._since -= 3600
    stage.sql("UPDATE workers SET seen_at = seen_at - interval '1 hour'")
    assert fallback.lapse(None, stores, window) == {"lost": 0, "taken_back": 0}
    stage.sql("UPDATE workers SET seen_at = now() - interval '1 hour' WHERE name = 'b'")
    window._since -= 3600
    window.looks = {life: (seen, at - 3600) for life, (seen, at) in window.looks.items()}
    assert fallback.lapse(None, stores, window) == {"lost": 1, "taken_back": 1}
    assert (stage.row(dead).state, stage.row(lives).state) == ("accepted", "running")
    window.restart()
    window._since -= 3600
    assert fallback.lapse(None, stores, window) == {"lost": 0, "taken_back": 0}


def test_nobody_is_given_up_while_postgres_takes_no_heartbeat_of_anybody(stage: Stage, stores: Stores) -> None:
    """Postgres answers but takes no write: its disk is full, or it is read-only.

    The observer's own heartbeat is missing there, too.
    """
    held = [running(stage, "a"), running(stage, "b")]
    stage.sql("UPDATE authority SET authority = 'postgres'")
    window = Window(3600.0)
    stage.sql("UPDATE workers SET seen_at = seen_at - interval '1 hour'")
    for _ in range(3):
        window._since -= 3600
        window.looks = {life: (seen, at - 3600) for life, (seen, at) in window.looks.items()}
        assert fallback.lapse(None, stores, window) == {"lost": 0, "taken_back": 0}
    # Postgres takes heartbeats again, and one of the two workers is still silent.
    stage.sql("UPDATE workers SET seen_at = now() WHERE name = 'b'")
    assert fallback.lapse(None, stores, window) == {"lost": 0, "taken_back": 0}
    window._since -= 3600
    window.looks = {life: (seen, at - 3600) for life, (seen, at) in window.looks.items()}
    assert fallback.lapse(None, stores, window) == {"lost": 1, "taken_back": 1}
    assert [stage.row(job).state for job in held] == ["accepted", "running"]
