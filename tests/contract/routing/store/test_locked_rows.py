"""A row that somebody keeps locked: the fate of other jobs is written all the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Connection, Engine, text

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.replies import Arrived, Ended
from celery_capacity.routing.ledger.snapshot import read_cards
from celery_capacity.routing.model.job import Publisher
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.recovery import rebuild, reclaim, reconcile, transition_log
from celery_capacity.routing.store import fencing, worker_rows
from celery_capacity.workers.app.install import create_app
from celery_capacity.workers.duties import fallback
from celery_capacity.workers.process.stores import make_engine
from celery_capacity.workers.results.outcome_writer import Recorder
from tests.fixtures.stores.books import job_field
from tests.fixtures.stores.noted import noted
from tests.fixtures.stores.staged import MOST_LOSSES, Stage
from tests.fixtures.waiting import until


@pytest.fixture
def stage(stage: Stage) -> Stage:
    stage.worker("a", cpus=4000)
    return stage


@pytest.fixture
def workers_own(settings: Settings) -> Iterator[Engine]:
    """Yield an engine as workers have it: with a bound for locks."""
    engine = make_engine(str(settings.database_url))
    yield engine
    engine.dispose()


@contextmanager
def locked(engine: Engine, *jobs: str) -> Iterator[Connection]:
    """Keep the rows of these jobs locked, as another client would."""
    with engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT 1 FROM jobs WHERE id = ANY(:ids) FOR UPDATE"), {"ids": list(jobs)})
        yield connection


def test_a_worker_writes_the_ends_of_all_others(engine: Engine, stage: Stage, workers_own: Engine) -> None:
    jobs = [stage.submit(cpus=1000, applied=False) for _ in range(3)]
    recorder = Recorder(workers_own, stage.ledger)
    recorder.start()
    with engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": jobs[1]})
        recorder.add(noted(stage.ledger))
        until(lambda: [stage.row(job).state for job in jobs] == ["admitted", "accepted", "admitted"], "the others are")
    assert recorder.flush(20.0)
    recorder.stop(5.0)
    assert stage.row(jobs[1]).state == "admitted"
    assert stage.redis.xlen(keys.STREAM) == 0


@pytest.mark.parametrize("known", [True, False], ids=["an end", "a claim"])
def test_locked_end_lets_postgres_decide_and_a_locked_claim_does_not(
    engine: Engine, stage: Stage, workers_own: Engine, known: bool
) -> None:
    job = stage.submit(cpus=1000, applied=known)
    token = Token(stage.ledger.epoch, 1)
    stage.ledger.settle("a", "a-life", arrived=[Arrived(job, token, "nonce")], most_losses=MOST_LOSSES)
    if known:
        stage.apply()
        stage.ledger.settle("a", "a-life", ended=[Ended(job, token, Outcome.SUCCEEDED)], most_losses=MOST_LOSSES)
    recorder = Recorder(workers_own, stage.ledger)
    recorder.start()
    with locked(engine, job):
        recorder.add(noted(stage.ledger))
        assert not recorder.flush(0.1)
        assert recorder.is_level(lambda: recorder.flush(0.1)) is known
    assert recorder.is_level(lambda: recorder.flush(20.0))
    recorder.stop(5.0)


def test_the_stream_is_applied_but_for_it(engine: Engine, stage: Stage, workers_own: Engine) -> None:
    jobs = [stage.submit(cpus=1000, applied=False) for _ in range(3)]
    with engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": jobs[1]})
        assert transition_log.apply_all(workers_own, stage.ledger)[0] == 2
        assert [stage.row(job).state for job in jobs] == ["admitted", "accepted", "admitted"]
        assert [transition.job for transition in noted(stage.ledger)] == [jobs[1]]
    assert transition_log.apply_all(workers_own, stage.ledger)[0] == 1


def test_stream_is_read_on_behind_a_locked_row(
    engine: Engine, stage: Stage, workers_own: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transition_log, "CHUNK", 2)
    jobs = [stage.submit(cpus=100, applied=False) for _ in range(7)]
    with locked(engine, jobs[0], jobs[3]):
        assert transition_log.apply_all(workers_own, stage.ledger)[0] == 5
        assert [transition.job for transition in transition_log.unapplied(stage.ledger)] == [jobs[0], jobs[3]]
    assert transition_log.apply_all(workers_own, stage.ledger)[0] == 2
    assert {stage.row(job).state for job in jobs} == {"admitted"}


def lose_books(stage: Stage) -> None:
    """Bring Redis back with its data: the stream survived, and the books are of another life of the server."""
    stage.redis.hset(keys.EPOCH, "run_id", "another life")


def end_unheard(stage: Stage, job: str) -> None:
    """Have a worker run a job and end it, so that only the stream has heard of either."""
    row = stage.row(job)
    token = Token(row.epoch, row.attempt)
    claimed = stage.ledger.settle(
        "a", "a-life", arrived=[Arrived(job, token, "nonce")], most_losses=MOST_LOSSES
    ).claimed
    assert claimed[0].ok
    stage.ledger.settle("a", "a-life", ended=[Ended(job, token, Outcome.SUCCEEDED)], most_losses=MOST_LOSSES)


def test_rebuild_loses_no_end_behind_a_locked_row(
    engine: Engine, stage: Stage, workers_own: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transition_log, "CHUNK", 2)
    jobs = [stage.submit(cpus=100) for _ in range(7)]
    for job in jobs:
        end_unheard(stage, job)
    with locked(engine, jobs[0], jobs[3]):
        lose_books(stage)
        opened = rebuild.open_if_cold(workers_own, stage.ledger)
        assert opened is not None and opened.held == 0
        assert [stage.row(job).state == "succeeded" for job in jobs] == [False, True, True, False, True, True, True]
        # Nobody brings them in before their ends are known.
        for job in (jobs[0], jobs[3]):
            row = stage.row(job)
            state = stage.ledger.submit(job, row.shape, row.seq, bytes(row.message), attempt=row.attempt)
            assert state.state == "exists"
    stage.apply()
    assert rebuild.bring_in_carried(stage.engine, stage.ledger) == 2
    assert [stage.row(job).state for job in jobs] == ["succeeded"] * 7
    # A submission that read their rows before, and comes only now, is refused.
    for job in (jobs[0], jobs[3]):
        row = stage.row(job)
        state = stage.ledger.submit(job, row.shape, row.seq, bytes(row.message), attempt=row.attempt)
        assert (state.state, state.was) == ("exists", "ended")
        assert stage.redis.pttl(keys.job(job)) > 0
    assert len(stage.redis.keys("ledger:job:*")) == 2


@pytest.mark.parametrize("last", ["waiting", "admitted", "running", "handed back"])
def test_rebuild_brings_in_a_locked_job_when_its_row_is_free(
    engine: Engine, stage: Stage, workers_own: Engine, last: str
) -> None:
    job = stage.submit(cpus=1000 if last != "waiting" else 9000, applied=False)
    token = Token(stage.ledger.epoch, 1)
    if last in ("running", "handed back"):
        stage.ledger.settle("a", "a-life", arrived=[Arrived(job, token, "nonce")], most_losses=MOST_LOSSES)
    if last == "handed back":
        ended = [Ended(job, token, Outcome.HANDED_BACK)]
        stage.ledger.settle("a", "a-life", ended=ended, most_losses=MOST_LOSSES, admit=False)
    with locked(engine, job):
        lose_books(stage)
        assert rebuild.open_if_cold(workers_own, stage.ledger) is not None
        assert transition_log.apply_all(workers_own, stage.ledger)[0] == 0
        assert not stage.redis.exists(keys.job(job))
        assert rebuild.bring_in_carried(stage.engine, stage.ledger) == 0
        assert not stage.redis.exists(keys.job(job))
    stage.apply()
    assert rebuild.bring_in_carried(stage.engine, stage.ledger) == 1
    card = read_cards(stage.redis, [job])[job]
    if last == "running":
        # Its worker is to say if it still holds the job.
        assert (card.state, card.token) == ("running", token)
    else:
        assert card.state == "waiting"
    assert rebuild.bring_in_carried(stage.engine, stage.ledger) == 0


def test_worker_is_not_taken_back_before_its_claims_are_known(
    engine: Engine, stage: Stage, workers_own: Engine
) -> None:
    """Its body has its row locked: it may commit, so no other attempt may begin."""
    job = stage.submit(cpus=1000, applied=False)
    token = Token(stage.ledger.epoch, 1)
    stage.ledger.settle("a", "a-life", arrived=[Arrived(job, token, "nonce")], most_losses=MOST_LOSSES)
    with engine.connect() as connection, connection.begin():
        assert fencing.commit(connection, Publisher(job, Token(stage.ledger.epoch, 1), "a-life"))
        stage.ledger.expire_lease("a", "a-life")
        assert reclaim.take_back(workers_own, stage.ledger, "a", "a-life", 0).verdict == "waits"
        assert job_field(stage.redis, job, "state") == b"running"
    assert reclaim.take_back(workers_own, stage.ledger, "a", "a-life", 0).verdict == "gone"
    assert (stage.row(job).state, stage.row(job).attempt) == ("succeeded", 1)
    with engine.connect() as connection:
        assert worker_rows.live_workers(connection, 60.0) == []


@pytest.mark.parametrize("known", [True, False], ids=["claim written", "claim unwritten"])
def test_other_jobs_of_a_lost_worker_are_taken_back_behind_a_locked_row(
    engine: Engine, stage: Stage, workers_own: Engine, known: bool
) -> None:
    jobs = [stage.submit(cpus=100, applied=known) for _ in range(3)]
    token = Token(stage.ledger.epoch, 1)
    arrived = [Arrived(job, token, "nonce") for job in jobs]
    stage.ledger.settle("a", "a-life", arrived=arrived, most_losses=MOST_LOSSES)
    if known:
        stage.apply()
    with locked(engine, jobs[1]):
        stage.ledger.expire_lease("a", "a-life")
        lapsed = reclaim.take_back(workers_own, stage.ledger, "a", "a-life", 0)
        assert (lapsed.verdict, lapsed.taken_back) == ("waits", 2)
        cards = read_cards(stage.redis, jobs)
        assert [cards[job].state for job in jobs] == ["waiting", "running", "waiting"]
    lapsed = reclaim.take_back(workers_own, stage.ledger, "a", "a-life", 0)
    assert (lapsed.verdict, lapsed.taken_back) == ("gone", 1)
    stage.apply()
    assert [stage.row(job).state for job in jobs] == ["waiting"] * 3


def test_rebuild_ends_while_the_row_of_an_orphan_is_locked(engine: Engine, stage: Stage, workers_own: Engine) -> None:
    orphans, waiting = [stage.submit(cpus=1000) for _ in range(2)], stage.submit(cpus=9000)
    for job in orphans:
        stage.start(job)
    stage.sql("UPDATE workers SET status = 'lost'")
    with locked(engine, orphans[0]):
        lose_books(stage)
        opened = rebuild.open_if_cold(workers_own, stage.ledger)
        assert opened is not None
        assert not stage.ledger.is_unfinished()
        stage.apply()
        states = [stage.row(job).state for job in (*orphans, waiting)]
        assert states == ["running", "waiting", "waiting"]
        # The locked row does not stop the repair of others, either.
        other = stage.insert({"cpus": 9000})
        stage.sql("UPDATE jobs SET state = 'waiting' WHERE id = :id", id=other)
        reconcile.reconcile(workers_own, stage.ledger)
        assert read_cards(stage.redis, [other])[other].state == "waiting"
    reconcile.reconcile(stage.engine, stage.ledger)
    stage.apply()
    assert [stage.row(job).state for job in orphans] == ["waiting", "waiting"]


def test_expiry_goes_on_behind_a_locked_row_while_postgres_decides(
    engine: Engine, stage: Stage, workers_own: Engine
) -> None:
    stage.sql("UPDATE authority SET authority = 'postgres'")
    jobs = [stage.insert({"cpus": 1000}) for _ in range(4)]
    stage.sql("UPDATE jobs SET expires_at = now() - interval '1 s' WHERE id = ANY(:ids)", ids=jobs[:2])
    stage.sql("UPDATE jobs SET revoked_at = now() WHERE id = ANY(:ids)", ids=jobs[2:])
    app = create_app("locked", resolve=lambda _: stage.settings)
    app.platform._made["engine"] = workers_own
    with locked(engine, jobs[0], jobs[2]):
        counts = fallback.expire(app, app.platform)
        assert (counts["expired"], counts["revoked"]) == (1, 1)
    counts = fallback.expire(app, app.platform)
    assert (counts["expired"], counts["revoked"]) == (1, 1)
    app.platform.sending.close()
    app.close()
