"""A transition that Postgres never takes is set aside with its job marked, and everything else goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import pytest
from sqlalchemy import Engine, create_engine, text

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.replies import Arrived, Ended
from celery_capacity.routing.model import outbox
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.outbox import Outbox
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome, Step
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.recovery import transition_log
from celery_capacity.routing.store.job_transitions import Transition
from celery_capacity.workers.process.stores import make_engine
from celery_capacity.workers.results.outcome_writer import Recorder
from tests.fixtures.stores.books import job_field
from tests.fixtures.stores.noted import noted
from tests.fixtures.stores.staged import MESSAGE, MOST_LOSSES, Stage
from tests.fixtures.waiting import until

#: An error that a database in ASCII cannot hold in any way.
ERROR: Final = "größer ✓"


@pytest.fixture
def stage(stage: Stage) -> Stage:
    stage.worker("a", cpus=40_000)
    return stage


@pytest.fixture
def in_ascii(database_url: str) -> Iterator[Engine]:
    """Yield an engine whose connections can say ASCII only.

    They stand for those to a database in SQL_ASCII (`initdb` under LANG=C).
    """
    engine = create_engine(database_url, isolation_level="AUTOCOMMIT", client_encoding="sql_ascii")
    yield engine
    engine.dispose()


@pytest.fixture
def workers_own(settings: Settings) -> Iterator[Engine]:
    """Yield an engine as workers have it: with a bound for locks."""
    engine = make_engine(str(settings.database_url))
    yield engine
    engine.dispose()


def refuse(stage: Stage, condition: str, code: str = "22P05") -> None:
    """Have Postgres refuse each write to `jobs` whose new row meets this condition."""
    stage.sql(
        f"CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'refused by the test' "
        f"USING ERRCODE = '{code}'; END $$"
    )
    stage.sql(
        f"CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON jobs FOR EACH ROW WHEN ({condition}) "
        "EXECUTE FUNCTION refuse()"
    )


def set_aside(stage: Stage) -> list[Any]:
    with stage.engine.connect() as connection:
        query = text("SELECT convert_from(raw, 'UTF8') AS raw, queue, reason, worker FROM quarantine ORDER BY id")
        return list(connection.execute(query))


def started(stage: Stage, number: int) -> list[str]:
    jobs = [stage.submit(cpus=1000, applied=False) for _ in range(number)]
    stage.apply()
    for job in jobs:
        stage.start(job)
    return jobs


def fail(stage: Stage, job: str, error: str, box: str = "") -> None:
    ended = [Ended(job, Token(1, 1), Outcome.FAILED, error, box)]
    assert stage.ledger.settle("a", "a-life", ended=ended, most_losses=MOST_LOSSES).released[0].verdict == "released"


def write_by_stream(engine: Engine, stage: Stage) -> None:
    transition_log.apply_all(engine, stage.ledger)


def write_by_recorder(engine: Engine, stage: Stage) -> None:
    recorder = Recorder(engine, stage.ledger)
    recorder.start()
    recorder.add(noted(stage.ledger))
    assert recorder.flush(20.0)
    recorder.stop(5.0)


WRITERS: Final = pytest.mark.parametrize("write", [write_by_stream, write_by_recorder])


@WRITERS
def test_error_that_postgres_cannot_hold_is_written_escaped(stage: Stage, in_ascii: Engine, write: Any) -> None:
    jobs = started(stage, 5)
    for job in jobs:
        fail(stage, job, ERROR if job == jobs[2] else "plain")
    write(in_ascii, stage)
    assert [stage.row(job).state for job in jobs] == ["failed"] * 5
    assert stage.row(jobs[2]).error == "gr\\xf6\\xdfer \\u2713"
    assert stage.row(jobs[1]).error == "plain"
    assert stage.redis.xlen(keys.STREAM) == 0
    assert set_aside(stage) == []


@WRITERS
def test_end_that_postgres_refuses_in_any_words_is_set_aside(stage: Stage, write: Any) -> None:
    """The job ends all the same, so that somebody sees it, and nobody runs it again."""
    jobs = started(stage, 5)
    for job in jobs:
        stage.end(job, applied=False)
    refuse(stage, f"NEW.id = '{jobs[2]}' AND NEW.step = {Step.ENDED.value}")
    write(stage.engine, stage)
    assert [stage.row(job).state for job in jobs] == ["succeeded"] * 5
    (entry,) = set_aside(stage)
    assert (entry.queue, entry.worker) == (keys.STREAM, "a")
    assert entry.reason.startswith("unwritable: ")
    assert jobs[2] in entry.reason
    # The count waits in the process, or went with the call that dropped the entry.
    assert (
        stage.ledger.tally.take()[Refusal.UNWRITABLE] + int(stage.redis.hget(keys.COUNTERS, Refusal.UNWRITABLE) or 0)
        == 1
    )
    assert json.loads(entry.raw)["job"] == jobs[2]
    assert "set aside" in stage.row(jobs[2]).error
    assert stage.redis.xlen(keys.STREAM) == 0
    assert job_field(stage.redis, jobs[2], "entry") is None


@WRITERS
def test_start_that_postgres_refuses_marks_its_job_and_the_end_follows(stage: Stage, write: Any) -> None:
    jobs = [stage.submit(cpus=1000, applied=False) for _ in range(3)]
    refuse(stage, f"NEW.id = '{jobs[1]}' AND NEW.step = {Step.ADMITTED.value}", "XX001")
    write(stage.engine, stage)
    assert [stage.row(job).state for job in jobs] == ["admitted", "accepted", "admitted"]
    assert "set aside" in stage.row(jobs[1]).error
    settled = stage.ledger.settle("a", "a-life", arrived=[Arrived(jobs[1], Token(1, 1), "n")], most_losses=MOST_LOSSES)
    assert settled.claimed[0].ok
    stage.ledger.settle("a", "a-life", ended=[Ended(jobs[1], Token(1, 1), Outcome.SUCCEEDED)], most_losses=MOST_LOSSES)
    write(stage.engine, stage)
    assert (stage.row(jobs[1]).state, stage.row(jobs[1]).error) == ("succeeded", None)


def test_unreadable_entry_of_the_stream_is_set_aside(stage: Stage) -> None:
    job = stage.submit(cpus=1000, applied=False)
    stage.redis.xadd(keys.STREAM, {"job": "job-x", "attempt": "many"})
    other = stage.submit(cpus=1000, applied=False)
    assert transition_log.apply_all(stage.engine, stage.ledger)[0] == 3
    assert [stage.row(job_id).state for job_id in (job, other)] == ["admitted", "admitted"]
    assert stage.redis.xlen(keys.STREAM) == 0
    (entry,) = set_aside(stage)
    assert entry.reason.startswith("no_transition: ")
    assert json.loads(entry.raw)["attempt"] == "many"


@WRITERS
def test_publish_that_postgres_refuses_keeps_no_end_back(stage: Stage, write: Any) -> None:
    jobs = started(stage, 3)
    refuse(stage, "NEW.id = 'child'")
    child = NewJob("child", "task", Request.of({"cpus": 1000}).shape, MESSAGE)
    fail(stage, jobs[0], "it broke", Outbox([child], [{"result": "kept"}]).to_text())
    stage.end(jobs[1], applied=False)
    write(stage.engine, stage)
    assert [stage.row(job).state for job in jobs] == ["failed", "succeeded", "running"]
    assert outbox.parse(stage.row(jobs[0]).outbox).results == [{"result": "kept"}]
    (entry,) = set_aside(stage)
    assert jobs[0] in entry.reason
    assert "child" in entry.raw


def test_retry_that_postgres_refuses_ends_its_job(stage: Stage) -> None:
    """An attempt without its successor would begin anew, for ever."""
    (job,) = started(stage, 1)
    refuse(stage, f"NEW.id = '{job}' AND NEW.successor IS NOT NULL")
    retry = NewJob(job, "task", Request.of({"cpus": 1000}).shape, MESSAGE, retries=1)
    ended = [Ended(job, Token(1, 1), Outcome.RETRIED, "", Outbox([retry]).to_text())]
    stage.ledger.settle("a", "a-life", ended=ended, most_losses=MOST_LOSSES)
    stage.apply()
    assert stage.row(job).state == "failed"
    assert "set aside" in stage.row(job).error
    assert len(set_aside(stage)) == 1


def test_postgres_that_takes_nothing_sets_nothing_aside(stage: Stage) -> None:
    """No entry is to blame where Postgres is read-only, for example."""
    jobs = [stage.submit(cpus=1000, applied=False) for _ in range(3)]
    refuse(stage, "true", "25006")
    with pytest.raises(Exception, match="refused by the test"):
        stage.apply()
    stage.sql("DROP TRIGGER refuse ON jobs")
    assert set_aside(stage) == []
    stage.apply()
    assert [stage.row(job).state for job in jobs] == ["admitted"] * 3


def test_row_that_cannot_be_written_keeps_its_entry_and_stops_nobody(stage: Stage) -> None:
    jobs = [stage.submit(cpus=1000, applied=False) for _ in range(3)]
    refuse(stage, f"NEW.id = '{jobs[1]}'", "XX001")
    stage.apply()
    assert [stage.row(job).state for job in jobs] == ["admitted", "accepted", "admitted"]
    assert [transition.job for transition in noted(stage.ledger)] == [jobs[1]]
    stage.sql("DROP TRIGGER refuse ON jobs")
    stage.apply()
    assert stage.row(jobs[1]).state == "admitted"


# -- locked rows


def lock_all(stage: Stage, engine: Engine, jobs: list[str]) -> Any:
    connection = engine.connect()
    connection.execute(text("SELECT 1 FROM jobs WHERE id = ANY(:ids) FOR UPDATE"), {"ids": jobs})
    return connection


def test_stream_is_applied_behind_a_thousand_locked_rows(engine: Engine, stage: Stage, workers_own: Engine) -> None:
    locked = [stage.submit(cpus=0, applied=False) for _ in range(1001)]
    free = [stage.submit(cpus=0, applied=False) for _ in range(3)]
    connection = lock_all(stage, engine, locked)
    try:
        assert transition_log.apply_all(workers_own, stage.ledger)[0] == 3
        assert {stage.row(job).state for job in free} <= {"admitted", "waiting"}
    finally:
        connection.close()
    assert transition_log.apply_all(workers_own, stage.ledger)[0] == 1001


@pytest.mark.leaves("I6", because="the ledger never had the jobs of these rows")
def test_recorder_writes_behind_a_thousand_locked_rows(engine: Engine, stage: Stage, workers_own: Engine) -> None:
    locked = [stage.insert({"cpus": 1000}) for _ in range(1001)]
    free = stage.insert({"cpus": 1000})
    transition = Transition("", Token(1, 1), "running", Step.RUNNING, "a", "a-life", 10, 20, 20, 0)
    recorder = Recorder(workers_own, stage.ledger)
    connection = lock_all(stage, engine, locked)
    try:
        recorder.start()
        recorder.add([replace(transition, job=job) for job in locked])
        recorder.add([replace(transition, job=free)])
        until(lambda: stage.row(free).state == "running", "what is behind them is written")
        assert not recorder.flush(0.01)
    finally:
        connection.close()
    assert recorder.flush(30.0)
    recorder.stop(5.0)
    assert {stage.row(job).state for job in locked} == {"running"}


@WRITERS
def test_bad_transition_of_a_locked_row_stops_no_other(
    engine: Engine, stage: Stage, database_url: str, write: Any
) -> None:
    bounded = create_engine(
        database_url,
        isolation_level="AUTOCOMMIT",
        client_encoding="sql_ascii",
        connect_args={"options": "-c lock_timeout=200"},
    )
    jobs = started(stage, 3)
    for job in jobs:
        fail(stage, job, ERROR if job == jobs[1] else "plain")
    with engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": jobs[1]})
        transition_log.apply_all(bounded, stage.ledger)
        assert [stage.row(job).state for job in jobs] == ["failed", "running", "failed"]
    write(bounded, stage)
    assert [stage.row(job).state for job in jobs] == ["failed"] * 3
    bounded.dispose()
