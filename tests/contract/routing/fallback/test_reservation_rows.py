"""Workers that pull keep to their rows as the policy says, and void rows hold up nobody."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, event, text

from celery_capacity.routing.fallback import reservation_rows
from celery_capacity.routing.model.expected import RunTime, expected_class
from celery_capacity.routing.policy.fill import fill_or_keep
from celery_capacity.routing.policy.placement import MAX_ADMITTED, TOP_PRIORITY, Book, Waiting, fits, order
from celery_capacity.routing.policy.reservation import Reservation, after_start
from celery_capacity.routing.store import claims
from celery_capacity.routing.store.claims import Passing
from tests.contract.routing.ledger.test_admission import ON_A_SERVER, REQUESTS, capacities, vectors
from tests.fixtures.property_tests import examples
from tests.fixtures.stores.books import MESSAGE, MOST_LOSSES
from tests.fixtures.stores.staged import Stage

#: Milliseconds from the writing of a reservation to its time. Far more than a test takes.
AHEAD: Final = 1_000_000
#: Expected run times: unknown, surely over by the reserved time, surely not.
EXPECTED: Final = st.sampled_from([0, *map(expected_class, (1024, 2**23))])
EPOCH: Final = 7
BACKLOG: Final = st.lists(st.tuples(REQUESTS, st.integers(0, 2), EXPECTED), min_size=1, max_size=20).map(
    lambda jobs: [
        Waiting(f"job-{seq:02}", request, order(rank, seq + 1), run_time=RunTime(expected, expected))
        for seq, (request, rank, expected) in enumerate(jobs)
    ]
)


def write_backlog(connection: Connection, backlog: Sequence[Waiting]) -> None:
    """Have these jobs wait in Postgres, which decides, and no others."""
    rows: list[dict[str, Any]] = []
    for waiting in backlog:
        level, seq = divmod(waiting.order, order(TOP_PRIORITY - 1, 0))
        rows.append(
            {"id": waiting.job, "shape": waiting.shape, "priority": TOP_PRIORITY - level, "seq": seq, "raw": MESSAGE}
        )
    connection.execute(text("DELETE FROM attempts"))
    connection.execute(text("DELETE FROM jobs"))
    connection.execute(text("DELETE FROM reservations"))
    connection.execute(text("UPDATE authority SET authority = 'postgres', epoch = :epoch"), {"epoch": EPOCH})
    connection.execute(
        text(
            "INSERT INTO jobs (id, seq, name, state, priority, shape, request, queue, message)"
            " VALUES (:id, :seq, 'celery.task', 'waiting', :priority, :shape, '{}', 'celery', :raw)"
        ),
        rows,
    )


def pull(connection: Connection, book: Book) -> tuple[list[str], Book]:
    """Let a worker pull once as its thread does; return the jobs, and its book with them."""
    held = reservation_rows.holding_back(connection, book.worker, EPOCH, MOST_LOSSES)
    chosen = claims.look(connection, book, MOST_LOSSES, (), held.reservation, held.now)
    if not chosen:
        return [], book
    ids = [row.job for row in chosen]
    passing = held.passing(chosen, MOST_LOSSES)
    taken = claims.take(connection, EPOCH, book.worker, "life", ids, MOST_LOSSES, passing)
    assert [row.job for row in taken] == ids
    for row in chosen:
        book = book.holding(claims.waiting_of(row, MOST_LOSSES).request)
    return ids, book


@pytest.mark.leaves("I1", "I2", "I6", because="jobs are taken by a worker that is not there", sometimes=True)
@settings(ON_A_SERVER, max_examples=examples(750))
@given(
    BACKLOG,
    capacities(st.integers(1, 6)),
    vectors(st.integers(0, 3)),
    vectors(st.integers(0, 3)),
    st.booleans(),
    st.sampled_from([1, 3, 200]),
    st.data(),
)
def test_pulls_on_a_reserved_worker_take_what_the_policy_says(
    engine: Engine,
    backlog: list[Waiting],
    capacity: dict[str, int],
    allocated: dict[str, int],
    beside: dict[str, int],
    timed: bool,
    page: int,
    data: st.DataObject,
) -> None:
    book = Book("w", capacity, allocated)
    able = [head for head in backlog if fits(head.request, replace(book, allocated={})) is None]
    if not able or not book.open:
        return
    head = data.draw(st.sampled_from(able))
    with (
        engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(claims, "PAGE", page)
        write_backlog(connection, backlog)
        now = reservation_rows.holding_back(connection, "w", EPOCH, MOST_LOSSES).now
        reservation = Reservation("w", head.shape, head.order, now + AHEAD if timed else 0, beside)
        reservation_rows.put(connection, reservation, head.job, EPOCH, None)
        started, pulled = [], book
        while True:
            ids, pulled = pull(connection, pulled)
            if not ids:
                break
            started += ids
        left = reservation_rows.holding_back(connection, "w", EPOCH, MOST_LOSSES).reservation
    expected = fill_or_keep(book, backlog, MAX_ADMITTED, (), reservation, now).admitted
    assert started == [waiting.job for waiting in expected]
    rest: Reservation | None = reservation
    for waiting in expected:
        rest = after_start(waiting, rest, now)
    if head in expected:
        rest = None
    assert (left and _positive(left.beside)) == (rest and _positive(rest.beside))


def _positive(amounts: Any) -> dict[str, int]:
    return {name: amount for name, amount in amounts.items() if amount > 0}


# -- single rows


WIDE: Final = {"cpus": 4000}
ROOM: Final = Book("a", {"cpus": 4000, "slots": 8}, {"cpus": 1000, "slots": 1})


@pytest.fixture
def stage(stage: Stage) -> Stage:
    stage.worker("a", cpus=4000)
    stage.sql("UPDATE authority SET authority = 'postgres', epoch = :epoch, changed_at = 'epoch'", epoch=EPOCH)
    return stage


@pytest.fixture
def connection(stage: Stage) -> Iterator[Connection]:
    with stage.engine.connect() as connection:
        yield connection
    stage.sql("UPDATE jobs SET revoked_at = now()")


def keep(stage: Stage, connection: Connection, beside: dict[str, int] | None = None, epoch: int = EPOCH) -> str:
    """Keep the worker for a new wide job, and return its id."""
    job = stage.insert(WIDE)
    head = _waiting(stage, job)
    reservation_rows.put(connection, Reservation("a", head.shape, head.order, 0, beside or {}, 1), job, epoch, None)
    return job


def _waiting(stage: Stage, job: str) -> Waiting:
    row = stage.row(job)
    return claims.waiting_of(claims.Candidate(job, row.shape, row.priority, row.seq, row.losses), MOST_LOSSES)


def look(connection: Connection, epoch: int = EPOCH) -> list[str]:
    held = reservation_rows.holding_back(connection, "a", epoch, MOST_LOSSES)
    return [row.job for row in claims.look(connection, ROOM, MOST_LOSSES, (), held.reservation, held.now)]


def test_row_of_another_epoch_holds_up_nobody(stage: Stage, connection: Connection) -> None:
    """The authority changes, and changes back: what was reserved before is void."""
    keep(stage, connection)
    later = stage.insert({"cpus": 1000})
    assert look(connection) == []
    stage.sql("UPDATE authority SET epoch = epoch + 2")
    assert look(connection, EPOCH + 2) == [later]
    # A runner of the old epoch writes nothing any more.
    keep(stage, connection)
    stand = reservation_rows.standing(connection, MOST_LOSSES)
    assert stand is not None
    assert [(row.worker, row.head) for row in stand.rows] == [("a", None)]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE jobs SET revoked_at = now() WHERE id = :job",
        "UPDATE jobs SET expires_at = now() - interval '1 s' WHERE id = :job",
        "UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE id = :job",
        "INSERT INTO pauses (kind, name, made_by) SELECT 'task', 'other', 'ann' WHERE :job <> ''",
    ],
)
def test_row_whose_job_waits_no_more_holds_up_nobody(stage: Stage, connection: Connection, change: str) -> None:
    job = keep(stage, connection)
    stage.sql("UPDATE jobs SET name = 'other' WHERE id = :job", job=job)
    later = stage.insert({"cpus": 1000})
    stage.sql(change, job=job)
    assert look(connection) == [later]
    stage.sql("DELETE FROM pauses")


def test_worker_takes_nothing_where_its_reservation_was_replaced(stage: Stage, connection: Connection) -> None:
    keep(stage, connection, {"cpus": 1000, "slots": 7})
    later = stage.insert({"cpus": 1000})
    held = reservation_rows.holding_back(connection, "a", EPOCH, MOST_LOSSES)
    assert held.row is not None
    assert held.reservation is not None
    passing = Passing(held.row.made_at, {"slots": 6})
    reservation_rows.put(connection, held.reservation, "nobody", EPOCH, held.row)
    assert not reservation_rows.is_current(connection, held.row)
    assert claims.take(connection, EPOCH, "a", "a-life", [later], MOST_LOSSES, passing) == []


def test_runner_replaces_no_row_beside_which_a_job_has_started(stage: Stage, connection: Connection) -> None:
    job = keep(stage, connection, {"cpus": 1000, "slots": 7})
    later = stage.insert({"cpus": 1000})
    seen = reservation_rows.holding_back(connection, "a", EPOCH, MOST_LOSSES)
    assert seen.row is not None
    assert seen.reservation is not None
    chosen = claims.look(connection, ROOM, MOST_LOSSES, (), seen.reservation, seen.now)
    passing = seen.passing(chosen, MOST_LOSSES)
    taken = claims.take(connection, EPOCH, "a", "a-life", [later], MOST_LOSSES, passing)
    assert [row.job for row in taken] == [later]
    reservation_rows.put(connection, seen.reservation, job, EPOCH, seen.row)
    left = reservation_rows.holding_back(connection, "a", EPOCH, MOST_LOSSES).reservation
    assert left is not None
    assert left.beside == {"slots": 6}
    stage.sql("UPDATE jobs SET state = 'accepted' WHERE id = :id", id=later)


# -- costs


@contextmanager
def statements(engine: Engine) -> Iterator[list[tuple[str, Any]]]:
    """Yield the list of the statements that the block executes."""
    noted: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        noted.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield noted
    finally:
        event.remove(engine, "before_cursor_execute", note)


def test_reservation_is_read_with_the_cordon_in_one_statement(stage: Stage, connection: Connection) -> None:
    keep(stage, connection)
    with statements(stage.engine) as noted:
        held = reservation_rows.holding_back(connection, "a", EPOCH, MOST_LOSSES)
    assert held.reservation is not None
    assert len(noted) == 1


def test_look_leaves_shapes_out_that_may_not_pass(
    stage: Stage, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many jobs of a shape wait behind the head, a look reads a page of them."""
    monkeypatch.setattr(claims, "PAGE", 4)
    keep(stage, connection)
    for _ in range(30):
        stage.insert({"cpus": 1000})
    with statements(stage.engine) as noted:
        assert look(connection) == []
    assert len([statement for statement, _ in noted if "UNION ALL" in statement]) == 2
