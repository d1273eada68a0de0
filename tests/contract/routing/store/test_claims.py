"""Postgres decides: the jobs that a worker takes from it, how ends are written, and when the authority changes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import Engine, text

from celery_capacity.routing.database.authority import (
    begin_epoch,
    decide_in_ledger,
    decide_in_postgres,
    end_opening,
    read_authority,
)
from celery_capacity.routing.model.message import parse_tag
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Step
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import Book
from celery_capacity.routing.store import claims, job_transitions
from celery_capacity.routing.store.claims import Candidate
from celery_capacity.routing.store.job_transitions import Transition
from celery_capacity.workers.membership.authority_check import Confirmation
from celery_capacity.workers.process.stores import transactions
from tests.fixtures.stores.staged import MESSAGE

MOST_LOSSES = 3
ONE = Request.of({"cpus": 1000}).shape
WIDE = Request.of({"cpus": 3000}).shape
EPOCH = 2


def book(**allocated: int) -> Book:
    """Return a book of a worker of four CPUs and eight slots."""
    return Book("", {"cpus": 4000, "slots": 8}, allocated)


def submit(engine: Engine, job: str, shape: str = ONE, **columns: Any) -> None:
    values = {"id": job, "shape": shape, "message": MESSAGE, "state": "accepted", "name": "task", "queue": "celery"}
    values |= {"request": "{}", **columns}
    times = {name for name in values if name.endswith("_at")}
    names = ", ".join(values)
    marks = ", ".join(f"now() + CAST(:{name} AS interval)" if name in times else f":{name}" for name in values)
    with engine.begin() as connection:
        connection.execute(text(f"INSERT INTO jobs ({names}) VALUES ({marks})"), values)


def row(engine: Engine, job: str) -> Any:
    with engine.connect() as connection:
        return connection.execute(text("SELECT * FROM jobs WHERE id = :id"), {"id": job}).one()


def seen(engine: Engine, name: str, lost_for: float | None, age: float = 0.0, status: str = "ready") -> None:
    """Note a worker that was seen so many seconds ago, and has been without the ledger for so many."""
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO workers (incarnation, name, cpus, memory, capacity, status, hostname, pid, boot_id,"
                " version, started_at, seen_at, ledger_lost_at) VALUES (:name || '-life', :name, 1, 1, '{}', :status,"
                " '', 1, '', '', now(), now() - make_interval(secs => :age), now() - make_interval(secs => :lost_for))"
            ),
            {"name": name, "age": age, "status": status, "lost_for": lost_for},
        )


@pytest.fixture
def decides(engine: Engine) -> Engine:
    """Return an engine where Postgres decides, in epoch 2."""
    with engine.begin() as connection:
        connection.execute(text("UPDATE authority SET authority = 'postgres', epoch = :epoch"), {"epoch": EPOCH})
    return engine


def take(engine: Engine, free: Book, worker: str = "w", epoch: int = EPOCH) -> list[str]:
    """Return the jobs that one look of a worker takes."""
    with transactions(engine).begin() as connection:
        chosen = [entry.job for entry in claims.look(connection, free, MOST_LOSSES)]
        return [entry.job for entry in claims.take(connection, epoch, worker, f"{worker}-life", chosen)]


# -- taking


def test_the_queue_of_a_successor_is_that_of_its_shape(decides: Engine) -> None:
    request = Request.from_shape(ONE)
    for job, before, after in (("in", "celery", "Vidéo:queue:x"), ("out", "mail", "celery"), ("stays", "mail", "mail")):
        columns = {"successor": MESSAGE, "successor_retries": 1, "successor_nesting": 0, "successor_priority": 0}
        columns |= {
            "successor_shape": request.within(after).shape,
            "successor_request": "{}",
            "attempt": 1,
            "epoch": EPOCH,
        }
        submit(
            decides, job, request.within(before).shape, queue=before, state="running", step=int(Step.RUNNING), **columns
        )
        with decides.begin() as connection:
            back = Transition(job, Token(EPOCH, 1), "scheduled", Step.BACK, "w", "w-life", 1, 1, 2, 0)
            job_transitions.apply(connection, [back])
        stored = row(decides, job)
        assert (stored.queue, stored.shape, stored.state) == (after, request.within(after).shape, "scheduled")


def test_an_attempt_is_made_with_its_token_in_the_row_and_in_the_message(decides: Engine) -> None:
    submit(decides, "job", attempt=4, epoch=1, step=int(Step.BACK))
    with decides.begin() as connection:
        (taken,) = claims.take(connection, EPOCH, "w", "w-life", ["job"])
    assert (taken.token, taken.shape) == (Token(2, 5), ONE)
    properties = json.loads(taken.message)["properties"]
    tag = parse_tag(properties.pop("delivery_tag"))
    assert tag is not None and (tag.job, tag.token) == ("job", Token(2, 5))
    assert properties == json.loads(MESSAGE)["properties"]
    stored = row(decides, "job")
    assert (stored.state, stored.epoch, stored.attempt, stored.step) == ("running", 2, 5, Step.RUNNING)
    assert (stored.worker, stored.incarnation, stored.started_at) == ("w", "w-life", stored.admitted_at)
    with decides.connect() as connection:
        attempt = connection.execute(text("SELECT * FROM attempts")).one()
    assert (attempt.job_id, attempt.epoch, attempt.attempt, attempt.ended_at) == ("job", 2, 5, None)


@pytest.mark.parametrize("due", [None, "submitted_at - interval '1 hour'", "submitted_at + interval '9 seconds'"])
def test_worker_learns_since_when_a_job_waits(decides: Engine, due: str | None) -> None:
    submit(decides, "job")
    with decides.begin() as connection:
        connection.execute(text(f"UPDATE jobs SET due_at = {due or 'NULL'}"))
    with decides.begin() as connection:
        (taken,) = claims.take(connection, EPOCH, "w", "w-life", ["job"])
    stored = row(decides, "job")
    since = stored.submitted_at if stored.due_at is None else max(stored.submitted_at, stored.due_at)
    assert taken.submitted_ms == pytest.approx(since.timestamp() * 1000, abs=1)


def test_nothing_is_taken_under_the_ledger_or_in_another_epoch(engine: Engine) -> None:
    submit(engine, "job")
    assert take(engine, book(), epoch=1) == []
    with engine.begin() as connection:
        connection.execute(text("UPDATE authority SET authority = 'postgres'"))
    assert take(engine, book(), epoch=2) == []
    assert take(engine, book(), epoch=1) == ["job"]


def test_two_workers_that_chose_the_same_jobs_share_nothing(decides: Engine) -> None:
    for number in range(4):
        submit(decides, f"job {number}")
    jobs = [f"job {number}" for number in range(4)]
    with transactions(decides).begin() as first, transactions(decides).begin() as second:
        assert [claimed.job for claimed in claims.take(first, EPOCH, "a", "a-life", jobs[:2])] == jobs[:2]
        assert [claimed.job for claimed in claims.take(second, EPOCH, "b", "b-life", jobs)] == jobs[2:]
    assert take(decides, book()) == []


def page(*losses: int) -> list[Candidate]:
    return [Candidate(f"job {number}", ONE, 0, number, lost) for number, lost in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "allocated", "chosen"),
    [
        ((0, 1, 0), {}, ["job 0", "job 1", "job 2"]),
        ((0, 2, 0), {}, ["job 1"]),
        ((0, 2, 0), {"cpus": 1000, "slots": 1}, ["job 0", "job 2"]),
        ((2,), {"cpus": 1000, "slots": 1}, []),
        ((0,), {"cpus": 1000, "slots": 1, "alone": 1}, []),
    ],
)
def test_the_last_chance_of_a_job_is_alone_on_its_worker(
    losses: tuple[int, ...], allocated: dict[str, int], chosen: list[str]
) -> None:
    assert [candidate.job for candidate in claims.choose(book(**allocated), page(*losses), MOST_LOSSES)] == chosen


# -- ends


def test_attempt_of_old_books_that_postgres_overtook_leaves_no_trace(decides: Engine) -> None:
    submit(decides, "job")
    assert take(decides, book()) == ["job"]
    late = Transition("job", Token(1, 1), "running", Step.RUNNING, "old", "old-life", 1, 1, 1, 0)
    with decides.begin() as connection:
        assert job_transitions.apply(connection, [late]) == []
        assert connection.execute(text("SELECT worker FROM attempts")).scalars().all() == ["w"]


# -- who decides


@pytest.mark.parametrize(
    ("workers", "changes"),
    [
        ([], False),
        ([("a", 20.0, 0.0, "ready")], True),
        ([("a", 20.0, 0.0, "ready"), ("b", 20.0, 0.0, "draining")], True),
        ([("a", 20.0, 0.0, "ready"), ("b", None, 0.0, "ready")], False),
        ([("a", 20.0, 0.0, "ready"), ("b", 5.0, 0.0, "ready")], False),
        ([("a", 20.0, 0.0, "ready"), ("b", None, 61.0, "ready")], True),
        ([("a", 20.0, 0.0, "ready"), ("b", None, 0.0, "left")], True),
    ],
)
def test_postgres_decides_when_all_live_workers_lost_the_ledger_long_ago(
    engine: Engine, workers: list[tuple[str, float | None, float, str]], changes: bool
) -> None:
    for name, lost_for, age, status in workers:
        seen(engine, name, lost_for, age, status)
    with engine.begin() as connection:
        assert decide_in_postgres(connection, 60.0, 10.0) == (2 if changes else None)
        assert decide_in_postgres(connection, 60.0, 10.0) is None
        assert read_authority(connection).authority == ("postgres" if changes else "ledger")


def test_the_ledger_decides_again_when_every_live_worker_reaches_it(decides: Engine) -> None:
    seen(decides, "a", None)
    seen(decides, "silent", 99.0, age=31.0)
    seen(decides, "b", 1.0)
    with decides.begin() as connection:
        assert decide_in_ledger(connection, 30.0) is None
        connection.execute(text("UPDATE workers SET ledger_lost_at = NULL WHERE name = 'b'"))
        assert decide_in_ledger(connection, 30.0) == EPOCH + 1


@pytest.mark.parametrize("authority", ["ledger", "postgres"])
def test_nobody_decides_for_a_while_after_the_authority_changed(engine: Engine, authority: str) -> None:
    def asked(since: str) -> Confirmation:
        with engine.begin() as connection:
            change = "UPDATE authority SET authority = :authority, changed_at = now() - CAST(:since AS interval)"
            connection.execute(text(change), {"authority": authority, "since": since})
        confirmation = Confirmation(engine, 500.0, lambda: None)
        confirmation.ask()
        return confirmation

    def may(confirmation: Confirmation) -> bool:
        assert not (confirmation.may_admit and confirmation.may_pull)
        return confirmation.may_admit if authority == "ledger" else confirmation.may_pull

    assert not may(asked("900 seconds"))
    # Postgres's clock was set back since: the time is counted from now.
    assert not may(asked("-1 hour"))
    assert may(asked("1100 seconds"))


def test_a_new_epoch_is_no_change_of_the_authority(engine: Engine) -> None:
    with engine.begin() as connection:
        before = read_authority(connection)
        assert begin_epoch(connection, 1, 20.0) == 2
        end_opening(connection, 2)
        assert begin_epoch(connection, 2, 20.0, above=40) == 41
        assert read_authority(connection).changed == before.changed


def test_a_job_that_must_not_run_again_is_known_as_such_by_who_takes_it(decides: Engine) -> None:
    """When the ledger is back, its worker enters it there: the first loss must end it there too."""
    submit(decides, "once", rerun=False)
    submit(decides, "again")
    with decides.begin() as connection:
        taken = claims.take(connection, EPOCH, "w", "w-life", ["once", "again"])
    assert {claimed.job: claimed.rerun for claimed in taken} == {"once": False, "again": True}


@pytest.mark.parametrize(
    ("worker", "doubtful"),
    [
        ("silent", True),
        ("lost since", True),
        ("said that it lost the ledger", False),
        ("seen since", False),
        ("left before", False),
    ],
)
def test_job_may_have_started_on_a_worker_silent_since_the_ledger_was_lost(
    decides: Engine, worker: str, doubtful: bool
) -> None:
    """Its number is left out, and its loss counted, once; a job that came later is not concerned."""
    submit(decides, "before")
    submit(decides, "once", rerun=False)
    with decides.begin() as connection:
        connection.execute(text("UPDATE jobs SET submitted_at = now() - interval '1 hour'"))
        connection.execute(text("UPDATE authority SET changed_at = now() - interval '30 minutes'"))
        seen = "10 minutes" if worker == "seen since" else "1 hour"
        status = {"lost since": "lost", "left before": "left"}.get(worker, "ready")
        ended = "20 minutes" if status != "ready" else None
        connection.execute(
            text(
                "INSERT INTO workers (incarnation, name, cpus, memory, capacity, status, hostname, pid, boot_id,"
                " version, started_at, seen_at, left_at, ledger_lost_at) VALUES ('x-life', 'x', 1, 1, '{}', :status,"
                " '', 1, '', '', now() - interval '2 hours', now() - CAST(:seen AS interval),"
                " now() - CAST(:ended AS interval), CASE WHEN :told THEN now() - interval '40 minutes' END)"
            ),
            {
                "status": status,
                "seen": seen,
                "ended": ended,
                "told": worker == "said that it lost the ledger",
            },
        )
    submit(decides, "after")
    with decides.begin() as connection:
        taken = claims.take(connection, EPOCH, "w", "w-life", ["before", "once", "after"])
    tokens = {claimed.job: (claimed.token, claimed.losses) for claimed in taken}
    more = int(doubtful)
    assert tokens == {
        "before": (Token(EPOCH, 1 + more), more),
        "once": (Token(EPOCH, 1 + more), 0),
        "after": (Token(EPOCH, 1), 0),
    }
