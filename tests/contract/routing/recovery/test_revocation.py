"""A job that was revoked while a worker held it never runs again, whatever becomes of the worker and of the books."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from celery import Celery
from sqlalchemy import Engine, text

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.insert import single, successors
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Arrived, Ended
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.recovery import rebuild, resubmit, revocation, transition_log
from celery_capacity.routing.store import backlog, claims
from celery_capacity.workers.app.install import create_app
from celery_capacity.workers.duties import fallback, sweep
from celery_capacity.workers.process.stores import Stores, make_engine
from celery_capacity.workers.results.cancellation import carry_out, revoke_jobs
from tests.fixtures.stores.books import job_field
from tests.fixtures.stores.staged import MESSAGE, MOST_LOSSES, Stage

ONE = Request.of({"cpus": 1000}).shape


@pytest.fixture
def stage(stage: Stage) -> Stage:
    stage.worker("a", cpus=4000)
    return stage


@pytest.fixture
def app(stage: Stage, settings: Settings) -> Iterator[Celery]:
    app = create_app("revoking", resolve=lambda _: settings)
    yield app
    stores: Stores = app.platform
    stores.sending.close()
    app.close()
    stores.engine.dispose()


def revoke(app: Celery, *jobs: str) -> int:
    return revoke_jobs(app, app.platform, jobs)


def lose_worker(stage: Stage) -> None:
    end = stage.ledger.now_ms() - 1000
    stage.redis.hset(keys.book("a"), "lease", end)
    stage.redis.zadd(keys.LEASES, {"a": end})
    assert stage.ledger.lapse("a", 0, MOST_LOSSES).verdict in ("closed", "gone")
    stage.ledger.lapse("a", 0, MOST_LOSSES)
    stage.apply()


@pytest.mark.parametrize(("started", "outcome"), [(False, "taken_back"), (True, "lost")])
def test_a_job_of_a_lost_worker_ends(stage: Stage, app: Celery, started: bool, outcome: str) -> None:
    job = stage.submit(cpus=1000)
    if started:
        stage.start(job)
    assert revoke(app, job) == 0
    assert stage.row(job).revoked_at is not None
    lose_worker(stage)
    row = stage.row(job)
    assert (row.state, row.error, row.attempt) == ("cancelled", "revoked", 1)
    with stage.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT outcome FROM attempts").scalars().all() == [outcome]
    # Neither store gives it out again.
    stage.worker("b", cpus=4000)
    assert stage.ledger.submit(job, ONE, 1, MESSAGE, attempt=1).state == "exists"


@pytest.mark.parametrize("outcome", ["handed_back", "lost", "retried"])
def test_a_job_that_comes_back_ends(stage: Stage, app: Celery, outcome: str) -> None:
    job = stage.submit(cpus=1000)
    stage.start(job)
    revoke(app, job)
    if outcome == "retried":
        with stage.engine.connect() as connection:
            successor = NewJob(job, "task", ONE, MESSAGE, publisher=1, retries=1)
            assert successors.put_successor(connection, successor) == "running"
    stage.end(job, outcome, applied=False)
    _, applied = transition_log.apply_all(stage.engine, stage.ledger)
    assert resubmit.go_on(stage.engine, stage.ledger, applied) == 0
    row = stage.row(job)
    assert (row.state, row.error, row.attempt) == ("cancelled", "revoked", 1)
    assert row.finished_at is not None


def test_a_replaced_job_does_not_go_on(stage: Stage, app: Celery) -> None:
    job = stage.submit(cpus=1000)
    stage.start(job)
    revoke(app, job)
    with stage.engine.connect() as connection:
        new = NewJob(job, "task", ONE, MESSAGE, publisher=1, nesting=1)
        assert successors.put_successor(connection, new) == "running"
    stage.end(job)
    assert stage.row(job).state == "cancelled"


def test_a_claim_is_told(stage: Stage, app: Celery) -> None:
    job, other = stage.submit(cpus=1000), stage.submit(cpus=1000)
    revoke(app, job)
    arrived = [Arrived(job_id, Token(stage.row(job_id).epoch, 1), "n") for job_id in (job, other)]
    claimed = stage.ledger.settle("a", "a-life", arrived=arrived, most_losses=MOST_LOSSES).claimed
    assert [(claim.ok, claim.revoked) for claim in claimed] == [(True, True), (True, False)]
    for job_id in (job, other):
        stage.apply()
        stage.end(job_id, "cancelled")


def test_new_books_know_it(stage: Stage, app: Celery) -> None:
    held, ends = stage.submit(cpus=1000), stage.submit(cpus=1000)
    stage.start(held)
    stage.start(ends)
    stage.redis.delete(keys.EPOCH)
    stage.sql("UPDATE authority SET changed_at = 'epoch'")
    # While no ledger decides, the row alone hears of it.
    revoke(app, held)
    opened = rebuild.open_if_cold(stage.engine, stage.ledger)
    assert opened is not None and opened.held == 2
    assert job_field(stage.redis, held, "revoked") == b"1"
    assert job_field(stage.redis, ends, "revoked") is None
    lose_worker(stage)
    assert (stage.row(held).state, stage.row(ends).state) == ("cancelled", "accepted")


def test_the_sweep_goes_on_with_what_was_only_marked(stage: Stage, app: Celery) -> None:
    """The client that revoked died between the row and the ledger."""
    running = stage.submit(cpus=4000)
    stage.start(running)
    waiting = stage.submit(cpus=1000)
    with stage.engine.connect() as connection:
        assert revocation.mark(connection, [running, waiting, "nobody"]) == [running, waiting]
    # The runner of the duties does so, too.
    app.platform.ledger.epoch = stage.ledger.epoch
    assert sweep.run_once(app, app.platform)["revoked"] == 1
    assert stage.row(waiting).state == "cancelled"
    stage.end(running, "handed_back")
    assert stage.row(running).state == "cancelled"
    assert sweep.run_once(app, app.platform)["revoked"] == 0


def test_sweep_goes_on_behind_a_revoked_job_whose_row_is_locked(
    engine: Engine, stage: Stage, app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounded = make_engine(str(stage.settings.database_url))
    monkeypatch.setitem(app.platform._made, "engine", bounded)
    kept, free, stranded = (stage.insert({"cpus": 1000}) for _ in range(3))
    stage.sql("UPDATE jobs SET submitted_at = submitted_at - interval '1 hour'")
    with stage.engine.connect() as connection:
        revocation.mark(connection, [kept, free])
    app.platform.ledger.epoch = stage.ledger.epoch
    with engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": kept})
        counts = sweep.run_once(app, app.platform)
        assert (counts["revoked"], counts["submitted"]) == (1, 1)
    # Its tombstone, which the ledger got before the row was found locked, has its time.
    assert stage.redis.pttl(keys.job(kept)) > 0
    stage.redis.delete(keys.job(kept))
    assert sweep.run_once(app, app.platform)["revoked"] == 1
    stage.apply()
    assert [stage.row(job).state for job in (kept, free, stranded)] == ["cancelled", "cancelled", "admitted"]
    bounded.dispose()


def test_ended_job_is_not_marked_as_revoked(stage: Stage, app: Celery) -> None:
    job = stage.submit(cpus=1000)
    stage.start(job)
    stage.end(job)
    assert revoke(app, job) == 0
    assert not carry_out(app.platform, job)
    row = stage.row(job)
    assert (row.state, row.revoked_at) == ("succeeded", None)


def test_without_the_ledger_the_row_is_enough(stage: Stage, app: Celery) -> None:
    """Postgres decides: a job that a worker pulled and gives back is pulled by no other."""
    stage.sql("UPDATE authority SET authority = 'postgres', changed_at = 'epoch'")
    job, marked = stage.insert({"cpus": 1000}), stage.insert({"cpus": 1000})
    with stage.engine.connect() as connection:
        epoch = read_authority(connection).epoch
        assert [entry.job for entry in claims.take(connection, epoch, "a", "a-life", [job])] == [job]
        assert revocation.mark(connection, [marked]) == [marked]
        assert claims.take(connection, epoch, "a", "a-life", [marked]) == []
        assert [entry.job for entry in claims.candidates(connection, 10)] == []
    counts = fallback.expire(app, app.platform)
    assert (counts["expired"], counts["revoked"]) == (0, 1)
    revoke(app, job)
    with stage.engine.connect() as connection:
        claims.give_back(
            connection, claims.open_attempts(connection, "a-life"), Outcome.TAKEN_BACK, "gone", MOST_LOSSES
        )
    assert {stage.row(job_id).state for job_id in (job, marked)} == {"cancelled"}


# The caller of the revoke does not reach the ledger.


@pytest.fixture
def blind(app: Celery) -> Celery:
    """Return an app whose process reaches Postgres alone."""
    stores: Stores = app.platform
    away = replace(stores.settings, redis_url="redis://127.0.0.1:1/0")
    stores._made["ledger"] = Ledger(away)
    return app


def sees_again(app: Celery, stage: Stage) -> Stores:
    stores: Stores = app.platform
    stores._made["ledger"] = stage.ledger
    return stores


def test_a_job_that_runs_unknown_to_postgres_has_its_own_end(stage: Stage, blind: Celery) -> None:
    job = stage.submit(cpus=1000, applied=False)
    token = Token(stage.ledger.epoch, 1)
    claimed = stage.ledger.settle("a", "a-life", arrived=[Arrived(job, token, "n")], most_losses=MOST_LOSSES).claimed
    assert claimed[0].ok
    assert revoke(blind, job) == 0
    row = stage.row(job)
    assert (row.state, row.revoked_at is not None) == ("accepted", True)
    sweep.run_once(blind, sees_again(blind, stage))
    assert job_field(stage.redis, job, "revoked") == b"1"
    ended = [Ended(job, token, Outcome.SUCCEEDED)]
    stage.ledger.settle("a", "a-life", ended=ended, most_losses=MOST_LOSSES)
    stage.apply()
    assert stage.row(job).state == "succeeded"


@pytest.mark.parametrize("state", ["accepted", "scheduled", "waiting"])
def test_a_job_that_has_not_started_starts_no_more_and_ends(stage: Stage, blind: Celery, state: str) -> None:
    if state == "waiting":
        # The ledger was lost meanwhile, and nobody brings the job in again.
        job = stage.submit(cpus=99_000)
        lost = [key for family in ("wait", "shapes", "asks") for key in stage.redis.keys(f"ledger:{family}*")]
        stage.redis.delete(*lost, keys.job(job))
    else:
        job = stage.insert({"cpus": 1000}, due_at=None if state == "accepted" else datetime(2020, 1, 1, tzinfo=UTC))
    stage.sql("UPDATE jobs SET submitted_at = submitted_at - interval '1 hour'")
    assert revoke(blind, job) == 0
    assert stage.row(job).state == state
    stores = sees_again(blind, stage)
    with stage.engine.connect() as connection:
        assert backlog.stranded(connection, 0.0, 10) == []
        assert backlog.due(connection, 10) == []
        assert backlog.backlog(connection, 10) == []
        assert backlog.these(connection, [job]) == []
        assert backlog.accepted(connection, [job]) == []
    assert sweep.run_once(blind, stores)["submitted"] == 0
    row = stage.row(job)
    assert (row.state, row.attempt, row.error) == ("cancelled", 0, "revoked")


STAMPS = [("text", "x"), ("number", 7), ("odd", "zero \0 and half a pair \udcff")]


def test_jobs_are_found_by_their_stamps(stage: Stage) -> None:
    with stage.engine.connect() as connection:
        for name, value in STAMPS:
            stamps = revocation.stamps_json([name, "none"], {name: [value, "more"]})
            single.insert_job(connection, NewJob(name, "task", ONE, MESSAGE, stamps=stamps))
        single.insert_job(connection, NewJob("plain", "task", ONE, MESSAGE))
        for name, value in STAMPS:
            assert revocation.stamped(connection, {name: value}) == [name]
            assert revocation.stamped(connection, {name: ["another", value]}) == [name]
            assert revocation.stamped(connection, {"no": value}) == []
        assert revocation.stamped(connection, {"text": "x", "number": [7, 8]}) == ["number", "text"]
        connection.exec_driver_sql("SET enable_seqscan = off")
        plan = connection.execute(text(f"EXPLAIN {revocation._STAMPED}"), {"stamp": '{"text": ["x"]}'})
        assert "jobs_stamps" in "\n".join(plan.scalars())
