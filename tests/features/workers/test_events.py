"""Events: a task's life has the same events as with plain Celery, and two more.

Source: Celery, Monitoring and Management Guide, "Events".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from celery import Celery, states
from celery.events.state import State

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.workers.results.events import READ_UP_TO
from tests.fixtures import tasks
from tests.fixtures.jobs.ear import Ear
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.plain_workers import start_plain
from tests.fixtures.processes.platforms import Platform
from tests.tasks.plain import plain_app

HOLD: Final = "tests.fixtures.tasks.hold"
TASKS: Final = "tests.tasks.heard"
OWN: Final = ("task-waiting", "task-admitted")


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("events")
    with standing_platform(server_pair, folder, TASKS) as running:
        running.worker("a", cpus=1, arguments=("-E",))
        yield running


@pytest.fixture
def ear(submitter: Submitter) -> Iterator[Ear]:
    submitter.app.conf.task_send_sent_event = True
    ear = Ear(submitter.app)
    yield ear
    ear.close()


def test_the_event_of_a_sent_task_waits_for_the_broker(submitter: Submitter, monkeypatch: pytest.MonkeyPatch) -> None:
    def publish(*_: Any, **__: Any) -> None:
        raise OSError("the broker is away")

    app: Any = submitter.app
    app.conf.update(task_send_sent_event=True, task_publish_retry_policy={"max_retries": 0})
    with app.connection_for_write() as connection:
        producer = app.amqp.Producer(connection)
        monkeypatch.setattr(producer.channel, "basic_publish", publish)
        result = app.send_task(f"{TASKS}.done", (1,), producer=producer)
    ((event, _),) = app.amqp._event_dispatcher._outbound_buffer
    assert (event["type"], event["uuid"]) == ("task-sent", result.id)
    # A dispatcher that keeps nothing raises, and the job is accepted all the same.
    monkeypatch.setattr(app.amqp._event_dispatcher, "buffer_while_offline", False)
    with app.connection_for_write() as connection:
        producer = app.amqp.Producer(connection)
        monkeypatch.setattr(producer.channel, "basic_publish", publish)
        assert app.send_task(f"{TASKS}.done", (1,), producer=producer).get(timeout=60) == result.get(timeout=60)


def test_event_of_a_large_job_that_waits_has_no_arguments(platform: Platform, submitter: Submitter, ear: Ear) -> None:
    full = submitter.send(HOLD, "full")
    tasks.started(platform.redis, "full")
    job = submitter.send(f"{TASKS}.done", "x" * READ_UP_TO, memory="1GiB")
    waiting = ear.until(job, "task-waiting")[-1]
    assert (waiting["name"], waiting["args"], waiting["kwargs"]) == (f"{TASKS}.done", None, None)
    tasks.let_go(platform.redis, "full")
    for ended in (full, job):
        assert submitter.ended(ended).state == "succeeded"


def test_a_job_that_waits_is_told_of(platform: Platform, submitter: Submitter, ear: Ear) -> None:
    full = submitter.send(HOLD, "full")
    tasks.started(platform.redis, "full")
    job = submitter.send(f"{TASKS}.done", 1, memory="1GiB")
    waiting = ear.until(job, "task-waiting")[-1]
    request = {"cpus": 1, "memory": 2**30, "slots": 1}
    facts = {"name": f"{TASKS}.done", "request": request, "queue": "celery"}
    call = {"args": "(1,)", "kwargs": "{}", "root_id": job, "parent_id": None}
    assert {**facts, **call, "attempt": 0, "allocation": None, "hostname": "backlog"}.items() <= waiting.items()
    tasks.let_go(platform.redis, "full")
    events = ear.until(job, "task-succeeded")
    assert [event["type"] for event in events] == [
        *("task-sent", "task-waiting", "task-admitted", "task-received", "task-started", "task-succeeded")
    ]
    row = submitter.ended(job)
    allocation = {"worker": "a", "attempt": 1, "token": f"{row.epoch}.1"}
    assert {**facts, "attempt": 1, "allocation": allocation}.items() <= events[2].items()
    assert submitter.ended(full).state == "succeeded"

    # Celery's own view of the cluster is the base of Flower's.
    state = State()
    for event in events:
        state.event(dict(event))
        seen = state.tasks[job]
        if event["type"] == "task-waiting":
            assert (seen.worker.hostname, seen.args) == ("backlog", "(1,)")
        assert (
            seen.state
            == {
                "task-sent": states.PENDING,
                "task-waiting": "WAITING",
                "task-admitted": "ADMITTED",
                "task-received": states.RECEIVED,
                "task-started": states.STARTED,
                "task-succeeded": states.SUCCESS,
            }[event["type"]]
        )
    assert (seen.name, seen.worker.hostname.partition("@")[0], seen.result) == (f"{TASKS}.done", "a", "1")
    assert [node.partition("@")[0] for node in state.workers] == ["backlog", "a"]
    assert seen.as_dict()["uuid"] == job
    assert [key for key, _ in state.tasks_by_time()][:1] == [job]
    # In any order of the events, a job that was seen to run is not seen to wait again.
    late = State()
    for event in reversed(ear.of(job)):
        late.event(dict(event))
    assert late.tasks[job].state == states.SUCCESS


def test_what_ends_in_the_backlog_is_told_as_celery_tells_it(
    platform: Platform, submitter: Submitter, ear: Ear
) -> None:
    full = submitter.send(HOLD, "full")
    tasks.started(platform.redis, "full")
    revoked = submitter.send(f"{TASKS}.done", 1, countdown=60)
    expired = submitter.send(f"{TASKS}.done", 1, expires=0.2)
    submitter.result(revoked).revoke()
    for job, how in ((revoked, False), (expired, True)):
        *_, event = ear.until(job, "task-revoked")
        assert (event["terminated"], event["signum"], event["expired"]) == (False, None, how)
        state = State()
        for entry in ear.of(job):
            state.event(dict(entry))
        assert state.tasks[job].state == states.REVOKED
    tasks.let_go(platform.redis, "full")
    submitter.ended(full)
    for job in (revoked, expired):
        assert [event["type"] for event in ear.of(job)].count("task-revoked") == 1


def test_what_cannot_be_begun_is_told_to_have_failed(platform: Platform, submitter: Submitter, ear: Ear) -> None:
    """Celery sends no event for an unreadable message, so its task would seem to be under way for ever."""
    submitter.app.conf.accept_content = ["json", "yaml"]
    job = submitter.send(f"{TASKS}.done", 1, serializer="yaml")
    assert submitter.ended(job).state == "failed"
    *_, event = events = ear.until(job, "task-failed")
    assert [entry["type"] for entry in events] == ["task-sent", "task-admitted", "task-failed"]
    assert event["exception"].startswith("InvalidTaskError(")
    assert submitter.value(submitter.send(f"{TASKS}.done", 1)) == 1
    assert [entry["type"] for entry in ear.of(job)].count("task-failed") == 1


@pytest.fixture(scope="module")
def plain(platform: Platform) -> Iterator[Celery]:
    """Yield an app of plain Celery, with a worker on the same server, in another database."""
    app = plain_app(platform.environment["REDIS_URL"], task_send_sent_event=True)
    start_plain(platform, "-E")
    yield app
    app.close()


def scenarios(app: Celery, redis: Any) -> dict[str, str]:
    """Return the id of a job for each scenario, by its name. The scenarios happen one after the other."""

    def send(name: str, *args: Any, **options: Any) -> str:
        return str(app.send_task(name, args, **options).id)

    past = datetime.now(UTC) - timedelta(minutes=1)
    job_ids = {
        "success": send(f"{TASKS}.done", 1),
        "failure": send(f"{TASKS}.fails"),
        "retry": send(f"{TASKS}.retries"),
        "reject": send(f"{TASKS}.rejects"),
        "replaced": send(f"{TASKS}.replaced"),
        "expired": send(f"{TASKS}.done", 1, expires=past),
        "terminated": send(HOLD, f"{app.main}.terminated"),
    }
    tasks.started(redis, f"{app.main}.terminated")
    app.control.revoke(job_ids["terminated"], terminate=True)
    return job_ids


#: Last event of each scenario.
LAST: Final = {
    "success": "task-succeeded",
    "failure": "task-failed",
    "retry": "task-succeeded",
    # The event is not `task-rejected`, because the message was acknowledged when the task started.
    "reject": "task-failed",
    "replaced": "task-succeeded",
    "expired": "task-revoked",
    "terminated": "task-revoked",
}
#: Scenarios in which a plain worker may have the next attempt's message before it hears of the last attempt's end.
RACES: Final = ("retry", "replaced")
#: Fields that differ between two lives of a task.
_CHANGES: Final = {"uuid", "hostname", "timestamp", "local_received", "clock", "pid", "runtime", "traceback", "root_id"}


def test_the_events_of_a_life_are_those_of_plain_celery(
    platform: Platform, submitter: Submitter, ear: Ear, plain: Celery
) -> None:
    with closing(Ear(plain)) as other:
        ours, theirs = scenarios(submitter.app, platform.redis), scenarios(plain, platform.redis)
        for how, last in LAST.items():
            lives = []
            for ear_of, jobs in ((ear, ours), (other, theirs)):
                events = [event for event in ear_of.until(jobs[how], last) if event["type"] not in OWN]
                # Celery sends `task-revoked` when a body is to be terminated, and again when its process has ended. The
                # second event may be there by now, or not.
                events = events[: [event["type"] for event in events].index(last) + 1]
                shapes = [(event["type"], *sorted(event.keys() - _CHANGES)) for event in events]
                lives.append(sorted(shapes) if how in RACES else shapes)
            assert lives[0] == lives[1], how
