"""Transactional enqueue: `apply_async(session=...)` and `submit_many(session=...)`.

The sweep of this platform comes once in ten minutes: a job that runs here was brought in by its commit.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from celery import chain, chord, group
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_capacity import InvalidRequest, LeaseLost, NotAccepted, Unsupported
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.process import attempts
from celery_capacity.workers.process.attempts import Attempt
from celery_capacity.workers.runner.commit_listener import NAME
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.servers.pair import empty_database
from tests.fixtures.waiting import until
from tests.tasks.bulky import double, total

ORDERS = "CREATE TABLE orders (number int PRIMARY KEY)"


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("transactional")
    with standing_platform(server_pair, folder, "tests.tasks.bulky") as running:
        running.environment["PLATFORM_SWEEP_INTERVAL"] = "600"
        with running.engine.begin() as connection:
            connection.execute(text(ORDERS))
        running.worker("a", cpus=2, pool="threads", slots=4)
        until(lambda: listeners(running) == 1, "the worker listens")
        yield running


@pytest.fixture
def app(submitter: Submitter) -> Iterator[Any]:
    submitter.app.set_current()
    yield submitter.app
    # Results that never came tell Redis when they are collected, so Redis must still be there.
    gc.collect()


@pytest.fixture
def engine_of_the_program(platform: Platform) -> Iterator[Engine]:
    """Yield an engine of the program's own, which opens transactions."""
    engine = create_engine(str(platform.settings.database_url))
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine_of_the_program: Engine) -> Iterator[Session]:
    with Session(engine_of_the_program) as opened:
        yield opened


def listeners(platform: Platform) -> int:
    with platform.engine.connect() as connection:
        here = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        query = text(f"{here} AND application_name = :n")
        return int(connection.execute(query, {"n": NAME}).scalar_one())


def known_to_the_ledger(platform: Platform, job: str) -> bool:
    return bool(platform.redis.exists(keys.job(job)))


def buy(session: Any, number: int) -> None:
    session.execute(text("INSERT INTO orders VALUES (:number)"), {"number": number})


def test_a_job_is_there_with_the_commit_of_its_session_and_not_before(
    app: Any, submitter: Submitter, platform: Platform, session: Session
) -> None:
    buy(session, 1)
    result = double.apply_async((4,), session=session, priority=3)
    put_off = double.apply_async((5,), session=session, countdown=3600)
    assert submitter.row(result.id) is None
    assert not known_to_the_ledger(platform, result.id)
    session.commit()
    # This process has brought the job in by now, whichever worker listens.
    assert known_to_the_ledger(platform, result.id)
    assert result.get(timeout=60) == 8
    row = submitter.ended(result.id)
    assert (row.priority, row.attempt, row.parent_id) == (3, 1, None)
    assert submitter.row(put_off.id).state == "scheduled"
    put_off.revoke()
    # The session's next transaction has jobs of its own.
    again = double.delay(1)
    next_one = double.apply_async((2,), session=session)
    session.commit()
    assert (again.get(timeout=60), next_one.get(timeout=60)) == (2, 4)


def test_a_rollback_leaves_nothing_of_a_savepoint_too(
    app: Any, submitter: Submitter, platform: Platform, session: Session
) -> None:
    buy(session, 10)
    gone = double.apply_async((1,), session=session)
    session.rollback()
    kept = double.apply_async((2,), session=session)
    with session.begin_nested() as savepoint:
        buy(session, 11)
        also_gone = double.apply_async((3,), session=session)
        savepoint.rollback()
    with session.begin_nested():
        nested = double.apply_async((4,), session=session)
    # A released savepoint is no commit.
    assert not known_to_the_ledger(platform, nested.id)
    session.commit()
    assert (kept.get(timeout=60), nested.get(timeout=60)) == (4, 8)
    with session.begin_nested():
        with session.begin_nested():
            inner = double.apply_async((5,), session=session)
        double.apply_async((6,), session=session)
    session.close()
    for job in (gone, also_gone, inner):
        assert submitter.row(job.id) is None
        assert not known_to_the_ledger(platform, job.id)


def test_a_connection_s_commit_is_heard_by_a_worker(
    app: Any, submitter: Submitter, platform: Platform, engine_of_the_program: Engine
) -> None:
    with engine_of_the_program.connect() as connection, connection.begin() as transaction:
        buy(connection, 20)
        first = double.apply_async((1,), session=connection)
        second = double.apply_async((2,), session=connection)
        with connection.begin_nested() as savepoint:
            gone = double.apply_async((3,), session=connection)
            savepoint.rollback()
        transaction.commit()
    assert (first.get(timeout=60), second.get(timeout=60)) == (2, 4)
    assert submitter.row(gone.id) is None
    row = submitter.ended(first.id)
    assert (row.state, row.attempt) == ("succeeded", 1)


def test_a_session_inside_of_another_transaction_waits_for_that(
    app: Any, submitter: Submitter, platform: Platform, engine_of_the_program: Engine
) -> None:
    with engine_of_the_program.connect() as connection, connection.begin() as outer:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            result = double.apply_async((7,), session=session)
            session.commit()
        assert submitter.row(result.id) is None
        assert not known_to_the_ledger(platform, result.id)
        outer.commit()
    # This process does not know of the job, but a worker does.
    assert result.get(timeout=60) == 14


def test_many_jobs_are_part_of_one_transaction(app: Any, submitter: Submitter, session: Session) -> None:
    stored: list[int] = []
    handle = app.submit_many(double, ((n,) for n in range(50)), session=session, chunk=20, progress=stored.append)
    together = group(double.s(n) for n in range(3)).apply_async(session=session)
    assert stored == [20, 40, 50]
    assert submitter.row(handle.id(0)) is None
    session.commit()
    assert [result.get(timeout=60) for result in handle] == [2 * n for n in range(50)]
    assert together.get(timeout=60) == [0, 2, 4]
    order = [submitter.row(job).seq for job in handle.ids()]
    assert order == sorted(order)
    with pytest.raises(InvalidRequest, match="cannot be written"):
        app.submit_many(double, [(1,), (object(),)], session=session, chunk=1)
    before = submitter.jobs()
    session.rollback()
    assert submitter.jobs() == before


def canvases(app: Any) -> dict[str, tuple[Any, Any]]:
    """Return each canvas and the value that it gives, by its name."""
    of_three = chord([double.s(1), double.s(2), double.s(3)], total.s())
    return {
        "a chain": (chain(double.s(1), double.s(), double.s()), 8),
        "a group": (group(double.s(1), double.s(2)), [2, 4]),
        "a chord": (of_three, 12),
        "a chord without a header": (chord([], total.s(), app=app), 0),
        "a chain of a group": (chain(group(double.s(1), double.s(2)), total.s(), double.s()), 12),
        "a group of a chain and a chord": (group(chain(double.s(1), double.s()), of_three.clone()), [4, 12]),
        "a chord of chains with a group as its body": (
            chord([chain(double.s(1), double.s())] * 2, group(total.s(), total.s())),
            [8, 8],
        ),
    }


def test_a_canvas_is_part_of_the_transaction_as_a_whole(
    app: Any, submitter: Submitter, session: Session, engine_of_the_program: Engine
) -> None:
    before = submitter.jobs()
    by_name = canvases(app)
    for canvas, _ in by_name.values():
        canvas.apply_async(session=session)
    session.rollback()
    assert submitter.jobs() == before
    sent = [canvas.apply_async(session=session, priority=2) for canvas, _ in by_name.values()]
    assert submitter.jobs() == before
    session.commit()
    assert [result.get(timeout=60) for result in sent] == [value for _, value in by_name.values()]
    with engine_of_the_program.begin() as connection:
        result = chord([double.s(4)], total.s()).apply_async(session=connection)
    assert result.get(timeout=60) == 8
    assert submitter.row(result.parent.results[0].id).priority == 0
    assert {submitter.row(result.id).priority for result in sent[1].results} == {2}


@pytest.mark.parametrize("kind", ["group", "chord"])
def test_publishes_of_a_generator_of_tasks_are_outside_the_transaction(
    app: Any, submitter: Submitter, session: Session, kind: str
) -> None:
    apart: list[Any] = []

    def made() -> Iterator[Any]:
        for number in range(5):
            apart.append(double.delay(number))
            yield double.s(number)

    before = submitter.jobs()
    canvas = group(made()) if kind == "group" else chord(made(), total.s())
    canvas.apply_async(session=session)
    session.rollback()
    assert [result.get(timeout=60) for result in apart] == [0, 2, 4, 6, 8]
    assert submitter.jobs() == before + 5


def test_a_session_means_nothing_where_tasks_run_in_this_process(app: Any, session: Session) -> None:
    app.conf.task_always_eager = True
    assert chord([double.s(1), double.s(2)], total.s()).apply_async(session=session).get() == 6
    assert group(double.s(1), double.s(2)).apply_async(session=session).get() == [2, 4]
    assert double.apply_async((4,), session=session).get() == 8


def test_of_a_canvas_that_cannot_be_sent_nothing_is_in_the_transaction(
    app: Any, submitter: Submitter, session: Session
) -> None:
    before = submitter.jobs()
    for wrong, error, expected_words in (
        (double.s(object()), InvalidRequest, "cannot be written"),
        (double.s(1).set(cpus=-1), InvalidRequest, "cpus"),
        (double.s(1).set(after=["another"]), Unsupported, "after the commit"),
    ):
        for canvas in (group([double.s(1), wrong]), chord([double.s(1), wrong], total.s())):
            with pytest.raises(error, match=expected_words):
                canvas.apply_async(session=session)
    with pytest.raises(InvalidRequest, match="Session or a Connection"):
        chord([double.s(1)], total.s()).apply_async(session="postgresql://")
    buy(session, 30)
    session.commit()
    assert submitter.jobs() == before


def test_more_jobs_than_this_process_keeps_are_brought_in_by_a_worker(
    app: Any, submitter: Submitter, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("celery_capacity.workers.submit.session_jobs.MAX_KEPT", 5)
    handle = app.submit_many(double, ((n,) for n in range(40)), session=session)
    session.commit()
    assert [result.get(timeout=60) for result in handle] == [2 * n for n in range(40)]


def test_the_platform_s_own_table_is_meant_whatever_the_search_path_says(
    app: Any, submitter: Submitter, session: Session
) -> None:
    session.execute(text("CREATE SCHEMA shop"))
    session.execute(text("CREATE TABLE shop.jobs (id int)"))
    session.execute(text("SET LOCAL search_path = shop"))
    result = double.apply_async((9,), session=session)
    assert session.execute(text("SELECT count(*) FROM shop.jobs")).scalar_one() == 0
    session.commit()
    assert result.get(timeout=60) == 18


def test_unusable_session_is_refused_before_anything_is_written(
    app: Any, submitter: Submitter, server_pair: Pair, engine_of_the_program: Engine
) -> None:
    before = submitter.jobs()
    with empty_database(server_pair) as other:
        elsewhere = create_engine(other)
        with Session(elsewhere) as session:
            session.execute(text(ORDERS))
            with pytest.raises(InvalidRequest, match="another database"):
                double.apply_async((1,), session=session)
            with pytest.raises(InvalidRequest, match="another database"):
                app.submit_many(double, [(1,)], session=session)
            # The transaction goes on.
            buy(session, 1)
            session.commit()
            assert session.execute(text("SELECT count(*) FROM jobs")).scalar_one() == 0
        elsewhere.dispose()
    with Session(create_engine("sqlite://")) as session, pytest.raises(InvalidRequest, match=r"database \(sqlite\)"):
        double.apply_async((1,), session=session)
    with Session() as session, pytest.raises(InvalidRequest, match="does not say which database"):
        double.apply_async((1,), session=session)
    with pytest.raises(InvalidRequest, match="run_sync"):
        double.apply_async((1,), session=type("AsyncSession", (), {})())
    with pytest.raises(InvalidRequest, match="Session or a Connection"):
        double.apply_async((1,), session="postgresql://")
    assert submitter.jobs() == before
    scoped = scoped_session(sessionmaker(engine_of_the_program))
    result = double.apply_async((1,), session=scoped)
    scoped.commit()
    scoped.remove()
    assert result.get(timeout=60) == 2


def test_a_transaction_that_has_failed_takes_no_job(app: Any, submitter: Submitter, session: Session) -> None:
    double.apply_async((1,), session=session)
    session.execute(text("SAVEPOINT before"))
    with pytest.raises(Exception, match="division by zero"):
        session.execute(text("SELECT 1 / 0"))
    with pytest.raises(NotAccepted, match="roll it back"):
        double.apply_async((2,), session=session)
    session.rollback()


def test_an_attempt_that_lost_its_lease_enqueues_nothing(app: Any, submitter: Submitter, session: Session) -> None:
    job = double.delay(1)
    row = submitter.ended(job.id)
    stale = Attempt(Tag(job.id, Token(row.epoch, row.attempt - 1)), row.incarnation)
    before = submitter.jobs()
    with attempts.held(stale), pytest.raises(LeaseLost, match="lost its lease"):
        double.apply_async((1,), session=session)
    session.commit()
    assert submitter.jobs() == before


def test_one_worker_listens_and_another_one_takes_over(
    app: Any, submitter: Submitter, platform: Platform, engine_of_the_program: Engine
) -> None:
    platform.worker("b", cpus=2, pool="threads", slots=4)
    assert listeners(platform) == 1
    first = platform.processes[0]
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    until(lambda: listeners(platform) == 1, "the other one listens")
    with engine_of_the_program.begin() as connection:
        result = double.apply_async((8,), session=connection)
    # The first worker's capacity is there until it counts as lost.
    assert submitter.ended(result.id).state == "succeeded"
    assert submitter.row(result.id).worker == "b"
