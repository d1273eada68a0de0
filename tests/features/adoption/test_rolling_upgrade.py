"""Rolling upgrade: from plain Celery while a producer goes on, and from one version of the platform to the next.

The steps from plain Celery are those of docs/how-to/rolling-upgrade.md.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery.result import AsyncResult
from sqlalchemy import Engine, text

from celery_capacity import InvalidRequest, migrations
from celery_capacity.routing import format_versions
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model import message as messages
from celery_capacity.workers.process import identity
from celery_capacity.workers.process.stores import platform_of
from tests.fixtures import tasks
from tests.fixtures.jobs.setting_aside import counter, set_aside
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import READY, Platform, Process
from tests.fixtures.waiting import until
from tests.tasks import rolling

ADD = "tests.fixtures.tasks.add"
#: Seconds between two messages of a producer.
EVERY = 0.03
#: Seconds for an answer of a worker, which comes at once.
PATIENCE = 60.0


class Producer:
    """Send numbers, one after the other, until the test stops it."""

    def __init__(self, app: Any, first: int) -> None:
        self.app = app
        self.sent: list[AsyncResult] = []
        self._first = first
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(EVERY):
            number = self._first + len(self.sent)
            # Some tasks are for later: a worker of plain Celery holds them until then.
            self.sent.append(self.app.tasks["rolling.count"].apply_async([number], countdown=number % 3 or None))

    def reaches(self, more: int) -> None:
        """Wait until this producer has sent `more` further tasks."""
        goal = len(self.sent) + more
        until(lambda: len(self.sent) >= goal, f"{goal} are sent")

    @contextmanager
    def going_on(self) -> Iterator[Producer]:
        self._thread.start()
        yield self
        self._stop.set()
        self._thread.join()


def plain_worker(platform: Platform, name: str) -> Process:
    options = ("--concurrency", "2", "--loglevel", "INFO", "-n", f"{name}@%h")
    return platform.start(name, "worker", *options, says=READY, ROLLING="plain", NODE_NAME="")


def run_dry(app: Any, name: str) -> None:
    """Make a plain worker take no more tasks, and wait until it holds none."""
    only = [f"{name}@{socket.gethostname()}"]
    assert app.control.cancel_consumer("celery", destination=only, reply=True, timeout=PATIENCE, limit=1)

    def holds() -> bool:
        inspect = app.control.inspect(destination=only, timeout=PATIENCE, limit=1)
        answers = [inspect.active(), inspect.reserved(), inspect.scheduled()]
        return any(not answer or any(answer.values()) for answer in answers)

    until(lambda: not holds(), f"{name} holds nothing")


@pytest.mark.long(45)
def test_old_and_new_workers_share_a_broker_and_every_task_runs_once(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in platform.environment.items():
        if name.startswith(("REDIS_URL", "DATABASE_URL", "PLATFORM_")):
            monkeypatch.setenv(name, value)
    platform.app = "tests.tasks.rolling"
    platform.environment.pop("PLATFORM_IMPORTS")
    old, new = Producer(rolling.make(plain=True), 0), Producer(rolling.make(plain=False), 1_000_000)
    before = [plain_worker(platform, name) for name in ("old-1", "old-2")]
    with old.going_on():
        old.reaches(50)
        # New workers start beside the old ones.
        platform.worker("new-1", cpus=4, ROLLING="platform")
        old.reaches(50)
        # Each old worker goes when it has run its tasks. A plain worker that stops while it begins a task may put back
        # its message, too.
        for worker in before:
            run_dry(old.app, worker.name)
            assert worker.stop(60) == 0
            old.reaches(50)
        # New producers start beside the old one, which goes last.
        with new.going_on():
            new.reaches(50)
    results = [*old.sent, *new.sent]
    values = [result.get(timeout=60) for result in results]
    ran: Any = platform.redis.hgetall(rolling.RAN)
    assert len(ran) == len(results)
    assert {number: times for number, times in ran.items() if times != b"1"} == {}
    where = {value.partition(" on ")[2] for value in values}
    assert where == {"old-1", "old-2", "new-1"}
    # Each task that the old workers did not run is a job, and each job ended once.
    jobs = sum(value.endswith("new-1") for value in values)

    def states() -> list[tuple[str, int]]:
        with platform.engine.connect() as connection:
            rows = connection.exec_driver_sql("SELECT state, count(*) FROM jobs GROUP BY state").all()
        return [(row[0], row[1]) for row in rows]

    # A result is there before its job's row shows the end.
    until(lambda: states() == [("succeeded", jobs)], lambda: f"{jobs} jobs have succeeded: {states()}")
    stores = platform_of(new.app)
    stores.sending.close()
    stores.engine.dispose()
    stores.redis.close()


# -- from one version of the platform to the next

#: Revisions that this version does not know: of its own format, and of the next.
NEXT_MINOR, NEXT_MAJOR = "0999", "1000"


def set_revision(engine: Engine, revision: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {migrations.VERSION_TABLE} SET version_num = :to"), {"to": revision})


def test_older_worker_starts_on_newer_tables_beside_newer_workers(platform: Platform, submitter: Submitter) -> None:
    """The additions are a revision, a column of jobs, and fields of messages and of the ledger's books."""
    with platform.engine.begin() as connection:
        connection.execute(text("ALTER TABLE jobs ADD COLUMN of_the_next_release text DEFAULT 'new'"))
    set_revision(platform.engine, NEXT_MINOR)
    worker = platform.worker("w", pool="threads")
    assert f"revision {NEXT_MINOR}" in worker.tail()
    platform.redis.hset(keys.EPOCH, "of_the_next_release", "new")
    platform.redis.hset(keys.book("w"), "of_the_next_release", "new")
    assert submitter.value(submitter.send(ADD, 40, 2)) == 42
    # A message of the release before has no format. A message of the next release may have unknown fields.
    newer = {"capacity_request": {"shape": "cpus=1000,slots=1", "declared": True, "of_the_next_release": [1]}}
    job = submitter.send(ADD, 1, 1, headers=newer)
    assert submitter.value(job) == 2
    assert message_of(submitter, job)["headers"]["capacity_request"]["format"] == format_versions.MESSAGE
    view = submitter.view("w")
    assert view["version"] == identity.platform_version()


def message_of(submitter: Submitter, job: str) -> dict[str, Any]:
    """Return the message that the job's row keeps."""
    return messages.decode(bytes(submitter.row(job).message))


def test_a_worker_refuses_tables_and_a_ledger_of_a_newer_format(platform: Platform, submitter: Submitter) -> None:
    set_revision(platform.engine, NEXT_MAJOR)
    tables = platform.start("tables", "worker")
    assert tables.wait() == 78
    assert f"revision {NEXT_MAJOR}" in tables.tail()
    set_revision(platform.engine, migrations.HEAD)
    worker = platform.worker("w", pool="threads")
    platform.redis.hset(keys.EPOCH, "format", format_versions.LEDGER + 1)
    books = platform.start("books", "worker", NODE_NAME="books")
    assert books.wait() == 78
    assert f"the ledger is of format {format_versions.LEDGER + 1}" in books.tail()
    # An older submitter leaves accepted jobs to newer workers: nothing is lost, and nothing is written to the ledger.
    job = submitter.send(ADD, 40, 2)
    assert submitter.row(job).state == "accepted"
    assert not platform.redis.exists(keys.job(job))
    assert worker.alive
    platform.redis.hset(keys.EPOCH, "format", format_versions.LEDGER)
    assert submitter.value(job) == 42


@pytest.mark.parametrize("said", [2, 0, "1", True, [1]])
def test_a_message_of_a_format_that_nobody_here_knows_is_no_message(said: object) -> None:
    with pytest.raises(InvalidRequest, match="format"):
        format_versions.check_message({"format": said})
    format_versions.check_message({"format": format_versions.MESSAGE})
    format_versions.check_message({})


@pytest.mark.parametrize("waits", [False, True], ids=["in its queue", "handed over by a release"])
def test_job_of_a_newer_format_goes_back_until_a_worker_knows_it(
    platform: Platform, submitter: Submitter, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    before = platform.worker("before", 1, "threads")
    gate = submitter.send("tests.fixtures.tasks.hold", "gate") if waits else ""
    if waits:
        tasks.started(platform.redis, "gate")
    monkeypatch.setattr(format_versions, "MESSAGE", format_versions.MESSAGE + 1)
    job = submitter.send(ADD, 40, 2, rerun=False)
    monkeypatch.undo()
    if waits:
        tasks.let_go(platform.redis, "gate")
        assert submitter.value(gate) == "before"
    line = before.wait_for(f"a message of format {format_versions.MESSAGE + 1}")
    assert job in line
    until(lambda: counter(platform, "refused.format") >= 2, "it came again, and goes back again")
    # The refused job is not lost, none of it is set aside, and the worker does its other work.
    row = submitter.row(job)
    assert (row.losses, row.finished_at) == (0, None)
    assert set_aside(platform) == []
    assert submitter.value(submitter.send(ADD, 1, 1, cpus=0.5, priority=9)) == 2
    assert sum("is handed back" in line for line in before.lines) == 1
    assert before.stop() == 0
    imports = f"{platform.environment['PLATFORM_IMPORTS']},tests.tasks.newer"
    platform.worker("next", 1, "threads", PLATFORM_IMPORTS=imports)
    assert submitter.value(job) == 42
    row = submitter.ended(job)
    assert (row.state, row.worker, row.losses) == ("succeeded", "next", 0)


def test_the_format_of_the_tables_is_in_the_number_of_their_revision() -> None:
    assert [format_versions.of_revision(revision) for revision in ("0001", "0999", "1000", "12345")] == [0, 0, 1, 12]
    assert format_versions.of_revision(migrations.HEAD) == 0
