"""Transitions reach Postgres late, in any order and batches, doubled, not all of them: the rows are the same."""

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

from routing import keys, store, stream
from routing.replies import Ended
from routing.request import Request
from routing.settings import Settings
from routing.states import FINAL, State, Step
from routing.store import NewJob, Transition
from tests.fixtures.books import MESSAGE
from tests.fixtures.staged import MOST_LOSSES, Stage

ON_A_SERVER: Final = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
SHAPE: Final = Request.of({"cpus": 1000}).shape
SUCCESSOR: Final = NewJob("", "task", Request.of({"cpus": 2000}).shape, b"the successor", priority=3, retries=1)


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection


# -- histories


@st.composite
def histories(draw: st.DrawFn, job: str) -> list[Transition]:
    """What may happen to one job, in its order, as the scripts note it."""
    epoch, attempt, losses, now = 1, 0, 0, 1000
    history: list[Transition] = []

    def note(state: str, step: Step, worker: str = "", **more: Any) -> None:
        history.append(
            Transition(
                job,
                epoch,
                attempt,
                state,
                step,
                worker,
                f"{worker}-life" if worker else "",
                more.pop("admitted_ms", 0),
                more.pop("started_ms", 0),
                now,
                losses,
                **more,
            )
        )

    for _ in range(draw(st.integers(0, 3))):
        now += 10
        epoch += draw(st.integers(0, 1))
        if draw(st.booleans()):
            note("waiting", Step.FILED)
        worker = draw(st.sampled_from(["a", "b"]))
        attempt += 1
        times = {"admitted_ms": now, "started_ms": 0}
        note("admitted", Step.ADMITTED, worker, **times)
        if draw(st.booleans()):
            now += 10
            times["started_ms"] = now
            note("running", Step.RUNNING, worker, **times)
        now += 10
        end = draw(st.sampled_from(["open", "final", "handed_back", "lost", "retried"]))
        if end == "open":
            return history
        if end == "final":
            outcome = draw(st.sampled_from(["succeeded", "failed", "cancelled", "expired"]))
            error = "it broke" if outcome == "failed" else ""
            note(outcome, Step.ENDED, worker, outcome=outcome, error=error, **times)
            return history
        losses += end == "lost"
        state = "scheduled" if end == "retried" else draw(st.sampled_from(["waiting", "accepted"]))
        note(state, Step.BACK, worker, outcome=end, error=f"{end} by {worker}", **times)
    if draw(st.booleans()):
        now += 10
        dropped = draw(st.sampled_from(["cancelled", "expired"]))
        note(dropped, Step.DROPPED, error=dropped)
    return history


#: Three jobs, whose transitions come in one stream.
SEVERAL: Final = st.tuples(*(histories(f"j{number}") for number in range(3)))


def span(one: Transition) -> tuple[str, int, int]:
    """The scripts replace an entry of the same span that Postgres does not have yet."""
    return one.job, one.epoch, one.attempt + (one.step in (Step.FILED, Step.DROPPED))


def thinned(history: Sequence[Transition], dropped: Sequence[bool]) -> list[Transition]:
    """Without some of the entries that a later one of their span replaced."""
    last = {span(one): one for one in history}
    return [one for one, drop in zip(history, dropped, strict=False) if last[span(one)] is one or not drop]


# -- what the rows must be


def expected_row(history: Sequence[Transition]) -> dict[str, Any]:
    """A row says what the newest transition says."""
    if not history:
        return {"state": "accepted", "epoch": 0, "attempt": 0, "step": 0, "losses": 0}
    newest = max(history, key=lambda one: one.rank)
    return {
        "state": newest.state,
        "epoch": newest.epoch,
        "attempt": newest.attempt,
        "step": int(newest.step),
        "losses": newest.losses,
        "worker": newest.worker or None,
        "incarnation": newest.incarnation or None,
        "admitted_at": newest.admitted_ms or None,
        "started_at": newest.started_ms or None,
        "finished_at": newest.at_ms if newest.state in FINAL else None,
        "error": newest.error or None,
    }


def expected_attempts(history: Sequence[Transition]) -> list[tuple[Any, ...]]:
    """(epoch, attempt, worker, admitted, started, ended, outcome, error) of each attempt: all that was said of it."""
    found: dict[tuple[int, int], tuple[Any, ...]] = {}
    for one in history:
        if one.step in (Step.FILED, Step.DROPPED):
            continue
        over = one.step in (Step.ENDED, Step.BACK)
        found[one.epoch, one.attempt] = (
            one.epoch,
            one.attempt,
            one.worker,
            one.admitted_ms or None,
            one.started_ms or None,
            one.at_ms if over else None,
            one.outcome or None,
            one.error or None,
        )
    return [found[token] for token in sorted(found)]


_ROW: Final = text(
    "SELECT state, epoch, attempt, step, losses, worker, incarnation, error,"
    " (extract(epoch FROM admitted_at) * 1000)::bigint AS admitted_at,"
    " (extract(epoch FROM started_at) * 1000)::bigint AS started_at,"
    " (extract(epoch FROM finished_at) * 1000)::bigint AS finished_at FROM jobs WHERE id = :job"
)
_ATTEMPTS: Final = text(
    "SELECT epoch, attempt, worker, (extract(epoch FROM admitted_at) * 1000)::bigint,"
    " (extract(epoch FROM started_at) * 1000)::bigint, (extract(epoch FROM ended_at) * 1000)::bigint, outcome, error"
    " FROM attempts WHERE job_id = :job ORDER BY epoch, attempt"
)


class Rows:
    """Rows of jobs that are made anew for each example, under ids of their own."""

    made = 0

    def __init__(self, connection: Connection) -> None:
        Rows.made += 1
        self.prefix = f"{Rows.made}-"
        self.connection = connection

    def insert(self, *jobs: str) -> None:
        for job in jobs:
            assert store.insert_job(self.connection, NewJob(self.prefix + job, "task", SHAPE, MESSAGE)).seq is not None

    def own(self, transitions: Sequence[Transition]) -> list[Transition]:
        return [replace(one, job=self.prefix + one.job) for one in transitions]

    def apply(self, transitions: Sequence[Transition]) -> list[store.Applied]:
        return store.apply(self.connection, self.own(transitions))

    def row(self, job: str) -> dict[str, Any]:
        found = self.connection.execute(_ROW, {"job": self.prefix + job}).one()
        return {name: value for name, value in found._mapping.items() if value is not None}

    def attempts(self, job: str) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in self.connection.execute(_ATTEMPTS, {"job": self.prefix + job})]

    def check(self, histories: Sequence[Sequence[Transition]]) -> None:
        for number, history in enumerate(histories):
            wanted = {name: value for name, value in expected_row(history).items() if value is not None}
            assert self.row(f"j{number}") == wanted
            assert self.attempts(f"j{number}") == expected_attempts(history)


def batches(transitions: Sequence[Transition], cuts: Sequence[int]) -> Iterator[Sequence[Transition]]:
    """The transitions in batches that end at the cuts (taken as they come, wrapped into the length)."""
    ends = sorted({cut % (len(transitions) + 1) for cut in cuts} | {len(transitions)})
    begin = 0
    for end in ends:
        yield transitions[begin:end]
        begin = end


@ON_A_SERVER
@given(SEVERAL, st.data())
def test_any_order_doubled_thinned_and_in_any_batches_gives_the_same_rows(
    connection: Connection, histories: Sequence[list[Transition]], data: st.DataObject
) -> None:
    together = [one for history in histories for one in history]
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
def test_each_transition_in_its_order_gives_the_rows_that_the_newest_ones_say(
    connection: Connection, histories: Sequence[list[Transition]]
) -> None:
    rows = Rows(connection)
    rows.insert("j0", "j1", "j2")
    for history in histories:
        for number, one in enumerate(history, 1):
            assert [applied.state for applied in rows.apply([one])] == [one.state]
            wanted = {name: value for name, value in expected_row(history[:number]).items() if value is not None}
            assert rows.row(one.job) == wanted
            # Again, it changes nothing.
            assert rows.apply([one]) == []
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
    newer = [replace(one, epoch=one.epoch + 5) for one in other]
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
    newest = max(history, key=lambda one: one.rank)
    older = data.draw(st.sampled_from([(newest.epoch - 1, 99), (newest.epoch, newest.attempt - 1)]))
    for state in State:
        zombie = replace(newest, epoch=older[0], attempt=older[1], state=state.value, step=Step.DROPPED, worker="")
        assert rows.apply([zombie]) == []
    assert rows.row("j0") == before


@ON_A_SERVER
@given(SEVERAL, st.integers(0, 10**6))
def test_two_writers_at_once_give_the_same_rows_and_do_not_wait_for_each_other_for_ever(
    engine: Engine, connection: Connection, histories: Sequence[list[Transition]], seed: int
) -> None:
    rows = Rows(connection)
    rows.insert("j0", "j1", "j2")
    together = [one for history in histories for one in history]

    def write(chance: random.Random) -> None:
        order = chance.sample(together, len(together))
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as own:
            for batch in batches(order, [chance.randrange(20) for _ in range(4)]):
                store.apply(own, rows.own(batch))

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, [random.Random(seed), random.Random(seed + 1)]))
    rows.check(histories)


# -- successors


def put_successor(rows: Rows, job: str = "j0", **more: Any) -> str | None:
    return store.put_successor(rows.connection, replace(SUCCESSOR, id=rows.prefix + job, **more))


def with_a_worker(outcome: str, state: str) -> list[Transition]:
    """One attempt that ended."""
    step = Step.ENDED if state in FINAL or state == "replaced" else Step.BACK
    one = Transition("j0", 1, 1, "admitted", Step.ADMITTED, "a", "a-life", 10, 0, 10, 0)
    return [
        one,
        replace(one, state="running", step=Step.RUNNING, started_ms=20, at_ms=20),
        replace(one, state=state, step=step, started_ms=20, at_ms=30, outcome=outcome),
    ]


def successor_of(rows: Rows, job: str = "j0") -> Any:
    query = text(
        "SELECT state, message, shape, retries, nesting, priority, successor, successor_retries, due_at <= now() AS due"
        " FROM jobs WHERE id = :job"
    )
    return rows.connection.execute(query, {"job": rows.prefix + job}).one()


ENDS: Final = [
    ("retried", "scheduled"),
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
    for one in order[:before]:
        rows.apply([one])
    assert put_successor(rows) is not None
    cuts = data.draw(st.lists(st.integers(0, 9), max_size=3))
    applied = [one for batch in batches(order[before:], cuts) for one in rows.apply(batch)]
    found = successor_of(rows)
    assert (found.state, bytes(found.message), found.shape) == ("scheduled", SUCCESSOR.message, SUCCESSOR.shape)
    assert (found.retries, found.nesting, found.priority, found.successor) == (1, 0, 3, None)
    assert found.due
    assert [one.due for one in applied if one.state == "scheduled"] == [True]
    assert rows.attempts("j0") == expected_attempts(history)


def test_a_successor_of_a_successor_runs_too(connection: Connection) -> None:
    rows = Rows(connection)
    rows.insert("j0")
    for attempt in (1, 2, 3):
        history = [replace(one, attempt=attempt) for one in with_a_worker("retried", "scheduled")]
        assert put_successor(rows, retries=attempt, message=b"%d" % attempt) is not None
        rows.apply(history)
        found = successor_of(rows)
        assert (found.state, bytes(found.message), found.retries) == ("scheduled", b"%d" % attempt, attempt)


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
def stage(engine: Engine, settings: Settings) -> Iterator[Stage]:
    stage = Stage(engine, settings)
    stage.worker("a", cpus=4000)
    yield stage
    stage.close()


@pytest.mark.parametrize("said", ["NUL \x00 inside", "half a character \ud800", "ünïcödé", "x" * 8000])
def test_any_error_text_of_a_task_reaches_the_row(stage: Stage, said: str) -> None:
    job = stage.submit(cpus=1000)
    stage.start(job)
    ended = [Ended(job, "1.1", "failed", said)]
    stage.ledger.settle("a", "a-life", ended=ended, most_losses=MOST_LOSSES)
    # The worker writes its own copy, and the stream has one.
    own = replace(stream.read(stage.ledger)[0], error=said)
    with stage.engine.connect() as connection:
        store.apply(connection, [own])
    stage.apply()
    row = stage.row(job)
    assert row.state == "failed"
    assert row.error[:3] == said[:3]


def test_entries_are_forgotten_when_they_are_written_and_not_before(stage: Stage) -> None:
    job = stage.submit(cpus=1000, applied=False)
    assert [one.state for one in stream.read(stage.ledger)] == ["admitted"]
    assert stage.redis.hexists(keys.job(job), "entry")
    assert stream.apply_all(stage.engine, stage.ledger)[0] == 1
    assert stream.read(stage.ledger) == []
    assert not stage.redis.hexists(keys.job(job), "entry")
    assert stage.row(job).state == "admitted"


def test_young_entries_are_left_to_the_worker_that_is_about_to_write_them(stage: Stage) -> None:
    stage.submit(cpus=1000, applied=False)
    assert stream.apply_all(stage.engine, stage.ledger, older_than_ms=60_000)[0] == 0
    assert stream.apply_all(stage.engine, stage.ledger)[0] == 1
