"""Signals (Celery: "Signals"): each fires once for its event, with the arguments that plain Celery gives."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from celery import Celery, signals, states
from celery.events.state import State
from celery.exceptions import WorkerLostError

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model.message import HEADER
from tests.fixtures import tasks
from tests.fixtures.jobs.ear import Ear
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.plain_workers import start_plain
from tests.fixtures.processes.platforms import Platform, Process
from tests.fixtures.waiting import until
from tests.tasks.heard import HEARD, OF_WORKERS
from tests.tasks.plain import plain_app

TASKS: Final = "tests.tasks.heard"
HOLD: Final = "tests.fixtures.tasks.hold"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the files of the signals that workers heard: the platform's, and plain Celery's."""
    folder = tmp_path_factory.mktemp("heard")
    return {"ours": folder / "ours", "plain": folder / "plain"}


@pytest.fixture(scope="module")
def platform(server_pair: Pair, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("signals"), TASKS) as running:
        running.environment[HEARD] = str(files["ours"])
        # A job whose process dies is over, as with plain Celery.
        running.environment["PLATFORM_MOST_LOSSES"] = "1"
        running.worker("a", cpus=2, arguments=("-E",))
        start_plain(running, **{HEARD: str(files["plain"])})
        yield running


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def heard_of(file: Path, job: str, last: str, count: int = 1, more: Path | None = None) -> Counter[tuple[Any, ...]]:
    """Return the signals of a job, counted, once `count` of the kind `last` are among them.

    Each signal is (name, sender, names of arguments, ...).
    """

    def own() -> list[dict[str, Any]]:
        return [line for line in [*lines(file), *(lines(more) if more else ())] if line["job"] == job]

    def found() -> list[dict[str, Any]]:
        heard = own()
        return heard if sum(line["signal"] == last for line in heard) >= count else []

    heard = until(found, lambda: f"{last} of {job}: {[line['signal'] for line in own()]}")
    return Counter(
        (line["signal"], line["sender"], *line["given"], line["expired"], line["terminated"]) for line in heard
    )


#: Task and options -> the last signal of the task, and how many of these there are.
LIVES: Final[dict[str, tuple[str, tuple[Any, ...], dict[str, Any], str, int]]] = {
    "success": (f"{TASKS}.done", (1,), {}, "task_postrun", 1),
    "failure": (f"{TASKS}.fails", (), {}, "task_postrun", 1),
    "retry": (f"{TASKS}.retries", (), {}, "task_success", 1),
    "a hook that fails": (f"{TASKS}.fails_twice", (), {}, "task_failure", 1),
    "reject": (f"{TASKS}.rejects", (), {}, "task_failure", 1),
    "replaced": (f"{TASKS}.replaced", (), {}, "task_success", 1),
    "expired": (f"{TASKS}.done", (1,), {"expires": "2020-01-01T00:00:00+00:00"}, "task_revoked", 1),
}


def test_the_signals_of_a_job_are_those_of_plain_celery(
    platform: Platform, submitter: Submitter, files: dict[str, Path]
) -> None:
    plain = plain_app(platform.environment["REDIS_URL"])
    jobs = {}
    for how, (name, args, options, *_) in LIVES.items():
        jobs[how] = [str(app.send_task(name, args, **options).id) for app in (submitter.app, plain)]
    for how, (*_, last, count) in LIVES.items():
        ours, theirs = jobs[how]
        for file, job in ((files["ours"], ours), (files["plain"], theirs)):
            heard_of(file, job, last, count)
    for ours, _ in jobs.values():
        submitter.ended(ours)
    for how, (*_, last, count) in LIVES.items():
        ours, theirs = jobs[how]
        heard = heard_of(files["ours"], ours, last, count)
        assert heard == heard_of(files["plain"], theirs, last, count), how
        assert ("task_internal_error" in {entry[0] for entry in heard}) == (how == "a hook that fails")
    plain.close()


@pytest.fixture
def ear(submitter: Submitter) -> Iterator[Ear]:
    ear = Ear(submitter.app)
    yield ear
    ear.close()


@pytest.mark.long
def test_a_job_that_is_lost_has_failed(
    platform: Platform, submitter: Submitter, files: dict[str, Path], ear: Ear, tmp_path: Path
) -> None:
    """The job is lost with its pool process, or with the whole worker. Another worker reports the second loss."""
    plain = plain_app(platform.environment["REDIS_URL"])
    theirs = str(plain.send_task(HOLD, ("theirs",)).id)
    ours = submitter.send(HOLD, "ours")
    others = tmp_path / "others"

    def start() -> Process:
        return platform.worker("dying", cpus=4, arguments=("-E",), **{HEARD: str(others)})  # type: ignore[arg-type]

    dying = start()
    with_worker = submitter.send(HOLD, "worker", cpus=4)
    for gate in ("theirs", "ours"):
        os.kill(tasks.started(platform.redis, gate)[1], signal.SIGKILL)
    tasks.started(platform.redis, "worker")
    dying.kill()
    # The next life takes over at once.
    its_next_life = start()
    expected = heard_of(files["plain"], theirs, "task_failure")
    # The deaths follow one another, since a pool of plain Celery that loses two processes at once may never end.
    theirs_too = str(plain.send_task(HOLD, ("theirs too",), ignore_result=True).id)
    quiet = submitter.send(HOLD, "quiet", ignore_result=True)
    for gate in ("theirs too", "quiet"):
        os.kill(tasks.started(platform.redis, gate)[1], signal.SIGKILL)
    assert heard_of(files["plain"], theirs_too, "task_failure") == expected
    for job in (ours, quiet, with_worker):
        assert submitter.ended(job).state == "lost"
        assert heard_of(files["ours"], job, "task_failure", more=others) == expected
        event = ear.until(job, "task-failed")[-1]
        assert event["exception"].startswith("WorkerLostError(")
        assert "WorkerLostError" in event["traceback"]
        seen = State()
        for entry in ear.of(job):
            seen.event(dict(entry))
        assert seen.tasks[job].state == states.FAILURE
        if job == quiet:
            continue
        with pytest.raises(WorkerLostError):
            submitter.value(job)
    assert its_next_life.stop() == 0
    plain.close()


def test_a_message_that_is_no_tasks_is_told_once(
    platform: Platform, submitter: Submitter, files: dict[str, Path]
) -> None:
    plain = plain_app(platform.environment["REDIS_URL"])

    def rejected(file: Path) -> list[dict[str, Any]]:
        return [line for line in lines(file) if line["signal"] == "task_rejected"]

    for app in (submitter.app, plain):
        with app.connection_for_write() as connection:
            connection.Producer().publish({"no": "task"}, routing_key="celery", exchange="", serializer="json")
    until(lambda: all(rejected(file) for file in files.values()), "both say that it was rejected")
    ours, theirs = (rejected(file) for file in files.values())
    assert (ours, len(ours)) == (theirs, 1)
    plain.close()


def test_the_signals_of_a_worker_are_those_of_plain_celery(platform: Platform, files: dict[str, Path]) -> None:
    """The signals span a worker's life, with equally many processes. Heartbeats depend on that life's length."""
    ours, theirs = platform.processes[0], platform.processes[1]
    assert (ours.stop(), theirs.stop()) == (0, 0)
    counts = []
    for file in files.values():
        heard_lines = [line for line in lines(file) if line["signal"] in OF_WORKERS]
        counts.append(
            Counter((line["signal"], *line["given"]) for line in heard_lines if line["signal"] != "heartbeat_sent")
        )
        assert any(line["signal"] == "heartbeat_sent" for line in heard_lines)
    assert counts[0] == counts[1]
    assert {name for name, *_ in counts[0]} == {*OF_WORKERS} - {"heartbeat_sent"}


@contextmanager
def connected(signal: Any, receiver: Callable[..., None]) -> Iterator[None]:
    signal.connect(receiver, weak=False)
    try:
        yield
    finally:
        signal.disconnect(receiver)


def published(app: Celery, **options: Any) -> tuple[str, list[tuple[str, Any, list[str]]]]:
    """Return a new job, and the signals that its sender heard: (signal, sender, names of arguments)."""
    heard: list[tuple[str, Any, list[str]]] = []

    def listen(name: str) -> Callable[..., None]:
        def note(sender: Any = None, signal: Any = None, **given: Any) -> None:
            heard.append((name, sender, sorted(given)))

        return note

    names = ("before_task_publish", "after_task_publish", "task_sent")
    with (
        connected(signals.before_task_publish, listen(names[0])),
        connected(signals.after_task_publish, listen(names[1])),
        connected(signals.task_sent, listen(names[2])),
    ):
        job = str(app.send_task(f"{TASKS}.done", (1,), **options).id)
    return job, heard


def test_who_submits_hears_what_plain_celery_says(platform: Platform, submitter: Submitter) -> None:
    plain = plain_app(platform.environment["REDIS_URL"])
    assert published(submitter.app, countdown=60)[1] == published(plain)[1]
    plain.control.purge()
    plain.close()


def test_before_it_is_published_a_job_may_still_be_changed(platform: Platform, submitter: Submitter) -> None:
    def change(headers: Any = None, properties: Any = None, **_: Any) -> None:
        headers["mine"] = "kept"
        headers[HEADER] = {**headers.get(HEADER, {}), "shape": "cpus=2000,memory=1073741824,slots=1"}
        properties["priority"] = 7

    with connected(signals.before_task_publish, change):
        job = submitter.send(f"{TASKS}.done", 1, countdown=60)
    row = submitter.row(job)
    assert (row.request, row.priority) == ({"cpus": 2, "memory": 2**30, "slots": 1}, 7)
    assert b'"mine":"kept"' in bytes(row.message)
    submitter.app.control.revoke(job)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda headers: headers[HEADER].update(shape="cpus=-1,slots=1"),
        lambda headers: headers[HEADER].update(shape="much"),
        lambda headers: headers.update(id="x" * 10_000),
        lambda headers: headers.update(mine=object()),
    ],
    ids=["a negative request", "no request", "an id that is none", "what JSON cannot hold"],
)
def test_what_a_signal_makes_invalid_is_refused(
    platform: Platform, submitter: Submitter, wrong: Callable[[Any], None]
) -> None:
    before = submitter.jobs()
    with (
        connected(signals.before_task_publish, lambda headers=None, **_: wrong(headers)),
        pytest.raises(InvalidRequest),
    ):
        submitter.send(f"{TASKS}.done", 1)
    assert submitter.jobs() == before
