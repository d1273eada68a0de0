"""Delivery of the results and calls that ended jobs left: each once, whatever the others are like."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from kombu.exceptions import DecodeError
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import Engine, event, text

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.outbox import UNANNOUNCED, UNTOLD, Outbox, parse
from celery_capacity.routing.model.states import State
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.store import fencing
from celery_capacity.workers.app.install import create_app
from celery_capacity.workers.process.attempts import Attempt, held
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.results import chord_parts as parts
from celery_capacity.workers.results import deliver_later, running_workers
from celery_capacity.workers.results.backends import CarriedResults
from celery_capacity.workers.results.cancellation import end_before_start
from celery_capacity.workers.results.chord_parts import ChordParts
from celery_capacity.workers.results.deliver_later import TOGETHER, TOGETHER_BYTES, context_of, deliver_rows, tell_late
from celery_capacity.workers.submit.encode import RawMessage
from tests.fixtures.stores.staged import Stage
from tests.fixtures.waiting import until

#: Bodies of old producers of which no arguments can be made.
UNREADABLE = (b"no JSON", b"[]", b"[[], {}, [1]]", b'[[], {}, {"errbacks": 1}]')


@pytest.fixture
def app(stage: Stage, settings: Settings) -> Iterator[Celery]:
    app = create_app("undelivered", resolve=lambda _: settings)
    yield app
    stores: Stores = app.platform
    stores.sending.close()
    app.close()
    stores.engine.dispose()


def accept(app: Celery, job: str, body: bytes = b"[[], {}, {}]", **headers: object) -> None:
    wire = {"task": "some.task", "id": job, **headers}
    app.amqp.job_sender.accept_raw(RawMessage(body, "application/json", "utf-8", wire, "celery", {}))


def test_a_job_whose_message_cannot_be_read_keeps_back_no_other(app: Celery, stage: Stage) -> None:
    jobs = [f"a-{number}" for number in range(len(UNREADABLE))]
    for job, body in zip(jobs, UNREADABLE, strict=True):
        accept(app, job, body)
    accept(app, "b")
    for job in [*jobs, "b"]:
        assert end_before_start(app.platform, job, State.CANCELLED, "revoked")
    deliver_rows(app, app.platform)
    assert [app.backend.get_state(job) for job in [*jobs, "b"]] == ["REVOKED"] * (len(jobs) + 1)
    # Results that a worker has still to announce keep back nobody either.
    assert [stage.row(job).outbox for job in [*jobs, "b"]] == [UNANNOUNCED] * (len(jobs) + 1)
    assert deliver_rows(app, app.platform) == 0


@pytest.mark.leaves("I3", because="the jobs are ended in their rows alone")
def test_an_outbox_that_cannot_be_read_keeps_back_no_other(app: Celery, stage: Stage) -> None:
    boxes = {"a-1": '{"publishes": [', "a-2": "[]", "a-3": '{"publishes": [{"id": 7}], "results": []}'}
    boxes |= {"a-4": '{"publishes": [], "results": [3]}', "b": UNTOLD}
    for job, box in boxes.items():
        accept(app, job)
        ended = "UPDATE jobs SET state = 'lost', finished_at = now(), outbox = :outbox WHERE id = :job"
        stage.sql(ended, job=job, outbox=box)
    deliver_rows(app, app.platform)
    assert [app.backend.get_state(job) for job in boxes] == ["FAILURE"] * 5
    with stage.engine.connect() as connection:
        reasons = connection.execute(text("SELECT reason FROM quarantine ORDER BY id")).scalars().all()
    assert [job in reason for job, reason in zip(boxes, reasons, strict=False)] == [True] * 4


def test_a_callback_that_cannot_be_called_keeps_back_no_other(app: Celery, stage: Stage) -> None:
    jobs = ["a-1", "a-2", "b"]
    for job, options in (("a-1", {"queue": "no queue"}), ("a-2", {"priority": "high"}), ("b", {})):
        errback = app.signature("some.errback", options=options)
        accept(app, job, json.dumps([[], {}, {"errbacks": [errback]}]).encode())
    stage.sql("UPDATE jobs SET state = 'lost', finished_at = now(), outbox = :untold", untold=UNTOLD)
    deliver_rows(app, app.platform)
    assert [app.backend.get_state(job) for job in jobs] == ["FAILURE"] * 3
    assert [stage.row(job).outbox for job in jobs] == [UNANNOUNCED] * 3
    with stage.engine.connect() as connection:
        called = connection.execute(text("SELECT parent_id FROM jobs WHERE name = 'some.errback'")).scalars().all()
    assert called == ["b"]


def result_of(app: Celery, job: str, value: object) -> str:
    """Return the outbox of a job that has succeeded with a value."""
    attempt = Attempt(Tag(job, Token(1, 1)), "life")
    with held(attempt):
        app.backend.store_result(job, value, "SUCCESS", request=Context(id=job))
    return attempt.outbox.to_text()


def ended(app: Celery, stage: Stage, count: int) -> list[str]:
    """Return jobs whose values are in their rows."""
    jobs = [stage.insert({"cpus": 1000}) for _ in range(count)]
    for number, job in enumerate(jobs):
        stage.sql(
            "UPDATE jobs SET state = 'succeeded', step = 11, finished_at = now(), outbox = :outbox WHERE id = :job",
            job=job,
            outbox=result_of(app, job, number),
        )
    return jobs


def test_results_alone_are_delivered_many_in_a_transaction(engine: Engine, app: Celery, stage: Stage) -> None:
    jobs = ended(app, stage, 2 * TOGETHER + 50)
    commits: list[Any] = []
    event.listen(app.platform.engine, "commit", commits.append)
    with engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT 1 FROM jobs WHERE id = :job FOR UPDATE"), {"job": jobs[7]})
        assert deliver_rows(app, app.platform) == len(jobs) - 1
    assert len(commits) < 10
    assert [app.backend.get_result(job) for job in jobs if job != jobs[7]] == [n for n in range(len(jobs)) if n != 7]
    assert deliver_rows(app, app.platform) == 1
    assert {stage.row(job).outbox for job in jobs} == {None}


def test_results_stay_in_their_rows_where_the_backend_takes_none(
    app: Celery, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = ended(app, stage, 3)

    def refuse(*_: object) -> None:
        raise RedisConnectionError("away")

    with monkeypatch.context() as patched:
        patched.setattr(CarriedResults, "deliver_results", refuse)
        patched.setattr(type(app.backend), "deliver_results", refuse)
        assert deliver_rows(app, app.platform) == 0
    assert None not in {stage.row(job).outbox for job in jobs}
    assert deliver_rows(app, app.platform) == 3


def test_result_that_the_backend_refuses_keeps_back_no_other(
    app: Celery, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class can be imported by the worker alone that ran it, for example."""
    jobs = sorted(ended(app, stage, 20))
    real = type(app.backend).deliver_results

    def refuse(backend: Any, notes: Any) -> None:
        if any(note["result"] == jobs[7] for note in notes):
            raise DecodeError("no such class")
        real(backend, notes)

    monkeypatch.setattr(type(app.backend), "deliver_results", refuse)
    assert deliver_rows(app, app.platform) == 19
    assert [job for job in jobs if stage.row(job).outbox is not None] == [jobs[7]]


def test_large_results_are_delivered_in_small_batches(
    app: Celery, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = ended(app, stage, 12)
    text_ = "x" * (TOGETHER_BYTES // 4)
    for job in jobs:
        stage.sql("UPDATE jobs SET outbox = :box WHERE id = :job", job=job, box=result_of(app, job, text_))
    largest = result_of(app, jobs[0], 2 * TOGETHER_BYTES * "y")
    stage.sql("UPDATE jobs SET outbox = :box WHERE id = :job", job=jobs[0], box=largest)
    sizes: list[int] = []
    real = type(app.backend).deliver_results

    def note(backend: Any, notes: Any) -> None:
        sizes.append(len(notes))
        real(backend, notes)

    monkeypatch.setattr(type(app.backend), "deliver_results", note)
    assert deliver_rows(app, app.platform) == len(jobs)
    assert max(sizes) == 3
    assert len(app.backend.get_result(jobs[0])) == 2 * TOGETHER_BYTES


def test_two_deliveries_at_once_call_an_errback_once(
    app: Celery, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass may last longer than the turn of its duty; and a client that revokes delivers by itself."""
    accept(app, "job", json.dumps([[], {}, {"errbacks": [app.signature("some.errback")]}]).encode())
    stage.sql("UPDATE jobs SET state = 'lost', finished_at = now(), outbox = :untold", untold=UNTOLD)
    began, go_on = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        began.set()
        assert go_on.wait(60)

    with monkeypatch.context() as patched:
        patched.setattr(deliver_later, "deliver", slow)
        first = threading.Thread(target=deliver_rows, args=(app, app.platform))
        first.start()
        assert began.wait(60)
    assert deliver_rows(app, app.platform) == 0
    go_on.set()
    first.join()
    assert stage.row("job").outbox == UNANNOUNCED
    with stage.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM jobs WHERE name = 'some.errback'")).scalar_one() == 1


def test_chain_goes_on_after_a_step_that_committed_and_died(app: Celery, stage: Stage) -> None:
    """Its effect is there, once; a client that waits for the end of the chain must not wait for ever."""
    steps = [app.signature(f"step.{number}", task_id=f"step-{number}") for number in (3, 2)]
    link = app.signature("some.link", task_id="link")
    accept(app, "job", json.dumps([[], {}, {"chain": steps, "callbacks": [link]}]).encode())
    for _ in range(2):
        stage.sql(
            "UPDATE jobs SET state = 'succeeded', finished_at = now(), outbox = :untold WHERE id = 'job'", untold=UNTOLD
        )
        assert deliver_rows(app, app.platform) == 1
    assert app.backend.get_state("job") == "SUCCESS"
    assert [(stage.row(job).name, stage.row(job).parent_id) for job in ("step-2", "link")] == [
        ("step.2", "job"),
        ("some.link", "job"),
    ]
    following = context_of(app, bytes(stage.row("step-2").message))
    assert following.args == [None]
    assert [step["options"]["task_id"] for step in following.chain] == ["step-3"]


@pytest.fixture
def become(app: Celery) -> Iterator[Callable[[ChordParts | None], None]]:
    """Yield a function that makes this process a worker with such threads, or (None) no worker."""
    running: list[Any] = []

    def change(parts: ChordParts | None) -> None:
        while running:
            running_workers.end(running.pop())
        if parts is not None:
            running.append(SimpleNamespace(app=app, parts=parts, announcer=None))
            running_workers.begin(running[0])

    yield change
    change(None)


@pytest.mark.leaves("I3", because="the jobs are ended in their rows alone")
def test_slow_part_is_left_to_its_deliverer_while_that_worker_lives(
    app: Celery, stage: Stage, monkeypatch: pytest.MonkeyPatch, become: Callable[[ChordParts | None], None]
) -> None:
    """The part keeps back nobody, and no row stays locked; its fate is noted when it is known."""
    mine, other = stage.worker("a"), ChordParts(stage.worker("b"))
    first = ChordParts(mine)
    become(first)
    for job in ("a", "b"):
        accept(app, job)
        stage.sql(
            "UPDATE jobs SET state = 'succeeded', finished_at = now(), outbox = :left WHERE id = :job",
            job=job,
            left=Outbox([], [{"chord": job, "group": "g"}]).to_text(),
        )
    counted, go_on = list[str](), threading.Event()

    def deliver_chord(_: object, note: dict[str, str]) -> None:
        counted.append(note["chord"])
        if note["chord"] == "a" and counted.count("a") < 3:
            assert go_on.wait(60)
            if counted.count("a") == 1:
                raise ConnectionError("away")

    monkeypatch.setattr(CarriedResults, "deliver_chord", deliver_chord)
    assert deliver_rows(app, app.platform) == 1
    assert stage.row("b").outbox is None
    assert parse(stage.row("a").outbox).by == mine
    # Neither this worker nor another one delivers it again.
    assert deliver_rows(app, app.platform) == 0
    become(other)
    assert deliver_rows(app, app.platform) == 0
    become(None)
    assert deliver_rows(app, app.platform) == 0
    # Nor where the row was made from the stream, in which nobody is named.
    left = Outbox([], [{"chord": "a", "group": "g"}]).to_text()
    stage.sql("UPDATE jobs SET outbox = :left WHERE id = 'a'", left=left)
    become(first)
    assert deliver_rows(app, app.platform) == 0
    assert parse(stage.row("a").outbox).by == mine
    assert counted == ["a", "b"]
    # The delivery failed: the part is anybody's.
    go_on.set()
    until(lambda: not parse(stage.row("a").outbox).by, "it is left")
    go_on.clear()
    assert deliver_rows(app, app.platform) == 0
    assert (parse(stage.row("a").outbox).by, counted) == (mine, ["a", "b", "a"])
    # Its worker died: the part is delivered once more. Nobody knows if it was delivered before.
    stage.sql("UPDATE workers SET status = 'lost' WHERE incarnation = :mine", mine=mine)
    become(other)
    assert deliver_rows(app, app.platform) == 1
    assert stage.row("a").outbox is None
    go_on.set()


@pytest.mark.leaves("I3", because="the jobs are ended in their rows alone")
def test_row_is_cleared_once_a_late_part_is_delivered(
    app: Celery, stage: Stage, monkeypatch: pytest.MonkeyPatch, become: Callable[[ChordParts | None], None]
) -> None:
    become(ChordParts(stage.worker("a")))
    accept(app, "job")
    stage.sql("UPDATE jobs SET state = 'cancelled', finished_at = now(), outbox = :untold", untold=UNTOLD)
    told_jobs, go_on = list[str](), threading.Event()

    def tell(_: Celery, job: str, *__: object) -> None:
        told_jobs.append(job)
        assert go_on.wait(60)

    monkeypatch.setattr(deliver_later, "_tell", tell)
    assert [deliver_rows(app, app.platform) for _ in range(2)] == [0, 0]
    go_on.set()
    until(lambda: stage.row("job").outbox == UNANNOUNCED, "its result is told")
    assert told_jobs == ["job"]


def test_a_value_alone_that_comes_late_waits_for_no_thread(
    app: Celery, monkeypatch: pytest.MonkeyPatch, become: Callable[[ChordParts | None], None]
) -> None:
    become(ChordParts("life"))
    monkeypatch.setattr(parts, "MAX_THREADS", 0)
    monkeypatch.setattr(fencing, "has_succeeded", lambda *_: True)
    stored: list[dict[str, str]] = []
    monkeypatch.setattr(app.backend, "deliver_results", stored.extend)
    left = [{"result": "job"}]
    tell_late(app, app.platform.engine, "life", "job", Token(1, 1), Outbox([], left).to_text())
    assert stored == left
