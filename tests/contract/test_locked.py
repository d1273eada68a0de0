"""A row that somebody keeps locked: what became of other jobs is written all the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from routing import keys, stream
from routing.settings import Settings
from tests.fixtures.staged import Stage
from tests.fixtures.waiting import until
from workers.recorder import Recorder
from workers.stores import make_engine


@pytest.fixture
def stage(engine: Engine, settings: Settings) -> Iterator[Stage]:
    stage = Stage(engine, settings)
    stage.worker("a", cpus=4000)
    yield stage
    stage.close()


@pytest.fixture
def workers_own(settings: Settings) -> Iterator[Engine]:
    """As workers have it: with a bound for locks."""
    engine = make_engine(str(settings.database_url))
    yield engine
    engine.dispose()


def test_a_worker_writes_the_ends_of_all_others(engine: Engine, stage: Stage, workers_own: Engine) -> None:
    jobs = [stage.submit(cpus=1000, applied=False) for _ in range(3)]
    recorder = Recorder(workers_own, stage.ledger)
    recorder.start()
    with engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": jobs[1]})
        recorder.add(stream.read(stage.ledger))
        until(lambda: [stage.row(job).state for job in jobs] == ["admitted", "accepted", "admitted"], "the others are")
    assert recorder.flush(20.0)
    recorder.stop(5.0)
    assert stage.row(jobs[1]).state == "admitted"
    assert stage.redis.xlen(keys.STREAM) == 0


def test_the_stream_is_applied_but_for_it(engine: Engine, stage: Stage, workers_own: Engine) -> None:
    jobs = [stage.submit(cpus=1000, applied=False) for _ in range(3)]
    with engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": jobs[1]})
        assert stream.apply_all(workers_own, stage.ledger)[0] == 2
        assert [stage.row(job).state for job in jobs] == ["admitted", "accepted", "admitted"]
        assert [one.job for one in stream.read(stage.ledger)] == [jobs[1]]
    assert stream.apply_all(workers_own, stage.ledger)[0] == 1
