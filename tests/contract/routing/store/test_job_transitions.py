"""Transitions reach Postgres late, in any order and batches, doubled, not all of them: the rows do not differ."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, text

from celery_capacity.routing.insert import successors
from celery_capacity.routing.ledger.replies import Ended
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.outbox import UNTOLD
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import FINAL, Outcome, State, Step
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.recovery import transition_log
from celery_capacity.routing.store import job_transitions
from celery_capacity.routing.store.job_transitions import Transition
from tests.fixtures.stores.books import job_field
from tests.fixtures.stores.noted import noted
from tests.fixtures.stores.staged import Stage
from tests.fixtures.stores.transitions import (
    SEVERAL,
    Rows,
    batches,
    expected_attempts,
    expected_row,
    histories,
    thinned,
)

ON_A_SERVER: Final = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
SUCCESSOR: Final = NewJob("", "task", Request.of({"cpus": 2000}).shape, b"the successor", priority=3, retries=1)


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection


@ON_A_SERVER
@given(SEVERAL, st.data())
def test_any_order_doubled_thinned_and_in_any_batches_gives_the_same_rows(
    connection: Connection, histories: Sequence[list[Transition]], data: st.DataObject
) -> None:
    together = [transition for history in histories for transition in history]
    kept = thinned(together, data.draw(st.lists(st.booleans(), min_size=len(together), max_size=len(together))))
    doubled = data.draw(st.lists(st.sampled_from(kept), max_size=5)) if kept else []
    order = data.draw(st.permutations([*kept, *doubled]))
    cuts = data.draw(st.lists(st.integers(0, 30), max_size=6))
    rows = Rows(connection)
    rows.insert("j0", "j1", "j2")
    for batch in batches(order, cuts):
        rows.apply(batch)
    rows.check(histories)


@ON_A_SERVER
@given(SEVERAL)
def test_transitions_in_each_order_give_the_rows_of_the_newest_ones(
    connection: Connection, histories: Sequence[list[Transition]]
) -> None:
    rows = Rows(connection)
    rows.insert("j0", "j1", "j2")
    for history in histories:
        for number, transition in enumerate(history, 1):
            assert [applied.state for applied in rows.apply([transition])] == [transition.state]
            wanted = {name: value for name, value in expected_row(history[:number]).items() if value is not None}
            assert rows.row(transition.job) == wanted
            # Again, it changes nothing.
            assert rows.apply([transition]) == []
    rows.check(histories)


@ON_A_SERVER
@given(histories("j0"), histories("j0"))
def test_a_final_state_has_no_exit_whatever_comes_later(
    connection: Connection, history: list[Transition], other: list[Transition]
) -> None:
    rows = Rows(connection)
    rows.insert("j0")
    rows.apply(history)
    if not history or history[-1].state not in FINAL:
        return
    before = rows.row("j0")
    newer = [
        replace(transition, token=Token(transition.token.epoch + 5, transition.token.attempt)) for transition in other
    ]
    assert rows.apply(newer) == []
    assert rows.row("j0") == before


@ON_A_SERVER
@given(histories("j0"), st.data())
def test_an_older_token_is_refused_whatever_it_says(
    connection: Connection, history: list[Transition], data: st.DataObject
) -> None:
    rows = Rows(connection)
    rows.insert("j0")
    rows.apply(history)
    before = rows.row("j0")
    if not history:
        return
    newest = max(history, key=lambda transition: transition.rank)
    epoch, attempt = newest.token
    older = data.draw(st.sampled_from([Token(epoch - 1, 99), Token(epoch, attempt - 1)]))
    for state in State:
        zombie = replace(newest, token=older, state=state.value, step=Step.DROPPED, worker="")
        assert rows.apply([zombie]) == []
    assert rows.row("j0") == before


@ON_A_SERVER
@given(SEVERAL, st.integers(0, 10**6))
def test_two_writers_at_once_give_the_same_rows_without_a_deadlock(
    engine: Engine, connection: Connection, histories: Sequence[list[Transition]], seed: int
) -> None:
    rows = Rows(connection)
    rows.insert("j0", "j1", "j2")
    together = [transition for history in histories for transition in history]

    def write(chance: random.Random) -> None:
        order = chance.sample(together, len(together))
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as session:
            for batch in batches(order, [chance.randrange(20) for _ in range(4)]):
                job_transitions.apply(session, rows.own(batch))

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, [random.Random(seed), random.Random(seed + 1)]))
    rows.check(histories)


# -- successors


def put_successor(rows: Rows, job: str = "j0", **more: Any) -> str | None:
    return successors.put_successor(rows.connection, replace(SUCCESSOR, id=rows.prefix + job, **more))


def with_a_worker(outcome: str, state: str) -> list[Transition]:
    """Return the transitions of one attempt that ended."""
    step = Step.ENDED if state in FINAL or state == "replaced" else Step.BACK
    admission = Transition("j0", Token(1, 1), "admitted", Step.ADMITTED, "a", "a-life", 10, 0, 10, 0)
    return [
        admission,
        replace(admission, state="running", step=Step.RUNNING, started_ms=20, at_ms=20),
        replace(admission, state=state, step=step, started_ms=20, at_ms=30, outcome=outcome),
    ]


def successor_of(rows: Rows, job: str = "j0") -> Any:
    query = text(
        "SELECT state, message, shape, retries, nesting, priority, successor, successor_retries, due_at <= now() AS due"
        " FROM jobs WHERE id = :job"
    )
    return rows.connection.execute(query, {"job": rows.prefix + job}).one()


ENDS: Final = [
    ("retried", "scheduled"),
    ("requeued", "scheduled"),
    ("succeeded", "succeeded"),
    ("failed", "failed"),
    ("expired", "expired"),
    ("lost", "lost"),
    ("lost", "scheduled"),
    ("lost", "waiting"),
    ("handed_back", "accepted"),
    ("replaced", "replaced"),
]


@ON_A_SERVER
@given(st.sampled_from(ENDS), st.data())
def test_an_attempt_that_ends_is_followed_by_its_successor(
    connection: Connection, end: tuple[str, str], data: st.DataObject
) -> None:
    rows = Rows(connection)
    rows.insert("j0")
    history = with_a_worker(*end)
    order = data.draw(st.permutations([*history, *data.draw(st.lists(st.sampled_from(history), max_size=3))]))
    before = data.draw(st.integers(0, order.index(history[-1])))
    for transition in order[:before]:
        rows.apply([transition])
    assert put_successor(rows) is not None
    cuts = data.draw(st.lists(st.integers(0, 9), max_size=3))
    applied = [transition for batch in batches(order[before:], cuts) for transition in rows.apply(batch)]
    row = successor_of(rows)
    assert (row.state, bytes(row.message), row.shape) == ("scheduled", SUCCESSOR.message, SUCCESSOR.shape)
    assert (row.retries, row.nesting, row.priority, row.successor) == (1, 0, 3, None)
    assert row.due
    assert [transition.due for transition in applied if transition.state == "scheduled"] == [True]
    assert rows.attempts("j0") == expected_attempts(history)


def test_a_successor_of_a_successor_runs_too(connection: Connection) -> None:
    rows = Rows(connection)
    rows.insert("j0")
    for attempt in (1, 2, 3):
        history = [replace(transition, token=Token(1, attempt)) for transition in with_a_worker("retried", "scheduled")]
        assert put_successor(rows, retries=attempt, message=b"%d" % attempt) is not None
        rows.apply(history)
        row = successor_of(rows)
        assert (row.state, bytes(row.message), row.retries) == ("scheduled", b"%d" % attempt, attempt)


def test_a_publish_that_is_there_already_is_ignored(connection: Connection) -> None:
    rows = Rows(connection)
    rows.insert("j0")
    assert put_successor(rows, retries=0) is None, "equal to the row's"
    assert put_successor(rows, retries=2, message=b"newer") == "accepted"
    assert put_successor(rows, retries=2, message=b"again") is None
    assert put_successor(rows, retries=1, message=b"older") is None
    assert bytes(successor_of(rows).successor) == b"newer"
    assert put_successor(rows, retries=2, nesting=1, message=b"replaced") == "accepted"


def test_a_revoked_job_has_no_successor(connection: Connection) -> None:
    rows = Rows(connection)
    rows.insert("j0")
    put_successor(rows)
    rows.apply(with_a_worker("cancelled", "cancelled"))
    assert rows.row("j0")["state"] == "cancelled"
    assert put_successor(rows, retries=5) is None


def test_a_successor_with_a_countdown_is_not_due(connection: Connection) -> None:
    rows = Rows(connection)
    rows.insert("j0")
    put_successor(rows, due_at=datetime.now(UTC) + timedelta(hours=1))
    (applied,) = rows.apply(with_a_worker("retried", "scheduled"))
    assert (applied.state, applied.due) == ("scheduled", False)


# -- the way from the scripts


@pytest.fixture
def stage(stage: Stage) -> Stage:
    stage.worker("a", cpus=4000)
    return stage


@pytest.mark.parametrize("told", [True, False])
def test_lost_job_is_told_by_its_worker_or_by_whoever_finds_it(stage: Stage, told: bool) -> None:
    """The rule also holds where another worker is the first to write its end."""
    job = stage.submit(cpus=1000)
    stage.start(job)
    ended = [Ended(job, Token(1, 1), Outcome.LOST, "its process died", told=told)]
    stage.ledger.settle("a", "a-life", ended=ended, most_losses=1)
    stage.apply()
    assert (stage.row(job).state, stage.row(job).outbox) == ("lost", None if told else UNTOLD)


def test_entries_are_forgotten_when_they_are_written_and_not_before(stage: Stage) -> None:
    job = stage.submit(cpus=1000, applied=False)
    assert [transition.state for transition in noted(stage.ledger)] == ["admitted"]
    assert job_field(stage.redis, job, "entry") is not None
    assert transition_log.apply_all(stage.engine, stage.ledger)[0] == 1
    assert noted(stage.ledger) == []
    assert job_field(stage.redis, job, "entry") is None
    assert stage.row(job).state == "admitted"


def test_young_entries_are_left_to_the_worker_that_is_about_to_write_them(stage: Stage) -> None:
    stage.submit(cpus=1000, applied=False)
    assert transition_log.apply_all(stage.engine, stage.ledger, older_than_ms=60_000)[0] == 0
    assert transition_log.apply_all(stage.engine, stage.ledger)[0] == 1


def test_a_job_that_ended_has_no_attempt_that_goes_on(connection: Connection) -> None:
    rows = Rows(connection)
    rows.insert("j0")
    first, second = with_a_worker("handed_back", "waiting"), with_a_worker("succeeded", "succeeded")
    # The end of attempt 1 is lost with the ledger.
    rows.apply(first[:1])
    rows.apply([replace(second[-1], token=Token(1, 2))])
    assert ended_attempts(connection) == [(1, "taken_back", job_transitions.END_LOST), (2, "succeeded", None)]
    # The end comes after all, and stands.
    rows.apply([first[-1]])
    assert ended_attempts(connection) == [(1, "handed_back", None), (2, "succeeded", None)]


def test_attempt_that_lost_its_job_to_a_newer_one_has_not_ended_it(connection: Connection) -> None:
    """Its body had lost its lease, and the books that held it still were told that it is over."""
    rows = Rows(connection)
    rows.insert("j0")
    first, second = with_a_worker("cancelled", "cancelled"), with_a_worker("succeeded", "succeeded")
    rows.apply(first[:1])
    rows.apply([replace(second[-1], token=Token(1, 2))])
    rows.apply([replace(first[-1], error="the job had ended as succeeded")])
    assert ended_attempts(connection) == [
        (1, "taken_back", "the job had ended as succeeded"),
        (2, "succeeded", None),
    ]


def test_attempt_that_is_heard_of_after_the_end_of_its_job_is_over(connection: Connection) -> None:
    """Its worker could not write for so long that another attempt ended the job meanwhile."""
    rows = Rows(connection)
    rows.insert("j0")
    first, second = with_a_worker("handed_back", "waiting"), with_a_worker("succeeded", "succeeded")
    rows.apply([replace(second[-1], token=Token(1, 2))])
    rows.apply(first[:1])
    assert ended_attempts(connection) == [(1, "taken_back", job_transitions.END_LOST), (2, "succeeded", None)]
    rows.apply([first[-1]])
    rows.apply(first[:1])
    assert ended_attempts(connection) == [(1, "handed_back", None), (2, "succeeded", None)]


def ended_attempts(connection: Connection) -> list[tuple[int, str, str | None]]:
    query = text("SELECT attempt, outcome, error FROM attempts WHERE ended_at IS NOT NULL ORDER BY 1")
    rows = connection.execute(query)
    return [(row[0], row[1], row[2]) for row in rows]
