"""Celery's broker on another server than the ledger: the traffic of each, and the behaviour when either is away."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from celery import Celery

from celery_capacity.platform.embedded import servers, valkey
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.errors import Unsupported
from celery_capacity.routing.inspect import verify
from celery_capacity.workers.app.install import create_app, install
from celery_capacity.workers.dispatch.submission_queue import SubmissionQueue
from celery_capacity.workers.membership.preflight import shares_ledger
from tests.fixtures import tasks
from tests.fixtures.jobs import garbage
from tests.fixtures.jobs.setting_aside import epoch_of, job_states, number_set_aside
from tests.fixtures.jobs.submitting import RESULT_WITHIN, Submitter, platform_with_broker
from tests.fixtures.processes.platforms import FOREIGN, Platform, Pool
from tests.fixtures.servers.proxy import Proxy
from tests.fixtures.waiting import until
from tests.tasks.work import read as events_of

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"
WORK = "tests.tasks.work.work"

#: First port that systems give to outgoing connections, which may include the port of a server that is down.
OUTGOING = 32768

_numbers = itertools.count()


@dataclass
class Server:
    """Manage a Redis of the test's own that can be killed and brought back, empty, at its old port."""

    folder: Path
    port: int
    url: str = ""

    def start(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.url = valkey.start(self.folder, self.port, durable=False).url

    def kill(self) -> None:
        running = valkey.running(self.folder)
        assert running is not None and running.kill()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Server]:
    # Each server has its own port, because kombu keeps connections by their address.
    server = Server(tmp_path / "broker", OUTGOING - 10_001 - (50 * os.getpid() + next(_numbers)) % 5_000)
    server.start()
    yield server
    if (running := valkey.running(server.folder)) is not None:
        running.kill()


@pytest.fixture
def platform(request: pytest.FixtureRequest, broker: Server, tmp_path: Path) -> Iterator[Platform]:
    with platform_with_broker(request.getfixturevalue("server_pair"), tmp_path, broker.url) as running:
        yield running


def all_succeeded(platform: Platform, number: int) -> None:
    until(
        lambda: job_states(platform) == {"succeeded": number},
        lambda: f"{number} jobs succeed; they are {job_states(platform)}",
    )


def once_each(trace: Path, labels: set[str]) -> None:
    """Assert that each of the jobs ran once, and to its end."""
    seen = Counter((event.label, event.what) for event in events_of(trace))
    assert seen == {(label, what): 1 for label in labels for what in ("start", "end")}


# -- the main job


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_jobs_go_by_the_ledger_and_celerys_own_messages_by_the_broker(
    platform: Platform, submitter: Submitter, broker: Server, pool: Pool
) -> None:
    worker = platform.worker("a", 4, pool)
    jobs = [submitter.send(ADD, number, 1, cpus=1 + number % 4) for number in range(12)]
    assert [submitter.value(job) for job in jobs] == list(range(1, 13))
    # Remote control goes by the broker.
    assert submitter.app.control.ping(timeout=60.0, limit=1)
    # Old producers use the broker too, and receive their results.
    with Celery("old", broker=broker.url, backend=platform.settings.redis_url, set_as_current=False) as old:
        assert old.send_task(ADD, [40, 2]).get(timeout=RESULT_WITHIN) == 42
    all_succeeded(platform, 13)
    with redis.Redis.from_url(broker.url) as client:
        names: Any = client.keys("*")
    assert not [name for name in names if name.startswith((b"worker.", b"ledger:", b"celery-task-meta"))]
    # Beat's ticks go by the broker too.
    before = submitter.view("a")["heartbeat_at"]
    platform.beat(PLATFORM_HEARTBEAT_INTERVAL="0.3")
    until(lambda: submitter.view("a")["heartbeat_at"] > before, "beat's tick is heard")
    assert worker.alive


def test_a_waiting_job_and_one_too_large_for_a_reply_are_delivered(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", 1, "threads")
    running = submitter.send(HOLD, "gate")
    tasks.started(platform.redis, "gate")
    small, large = submitter.send(ADD, 1, 2), submitter.send(ADD, "x" * 200_000, "y")
    assert submitter.row(small).state in ("accepted", "waiting")
    tasks.let_go(platform.redis, "gate")
    assert submitter.value(small) == 3
    assert len(submitter.value(large)) == 200_001
    assert submitter.ended(running).state == "succeeded"


def test_garbage_and_forged_messages_in_the_ledger_queue_go_aside(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", 2, "threads")
    queue = submitter.view("a")["queue"]
    pushed = garbage.malformed("own", epoch_of(platform))
    platform.redis.lpush(queue, *pushed)
    until(
        lambda: number_set_aside(platform) == len(pushed),
        lambda: f"{len(pushed)} are set aside: {number_set_aside(platform)}",
    )
    assert submitter.value(submitter.send(ADD, 1, 2, cpus=2)) == 3


# -- the broker is away


def test_a_broker_that_is_away_keeps_nobody_from_sending_and_ends_nobody(
    platform: Platform, submitter: Submitter, broker: Server, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    workers = [platform.worker("a", 2, "prefork"), platform.worker("b", 2, "threads")]
    labels = [str(number) for number in range(60)]
    broker_away = threading.Event()

    def send() -> None:
        for number, label in enumerate(labels):
            if number == 20:
                broker.kill()
                broker_away.set()
            submitter.send(WORK, str(trace), label, 0.02)

    sender = threading.Thread(target=send)
    sender.start()
    assert broker_away.wait(60)
    sender.join(60)
    assert not sender.is_alive()
    assert sum(job_states(platform).values()) == len(labels)
    # A program that begins now sends as well.
    late = create_app("late", resolve=lambda _: platform.settings)
    late.send_task(WORK, [str(trace), "late", 0.02])
    for worker in workers:
        worker.wait_for("Trying again in")
    broker.start()
    all_succeeded(platform, len(labels) + 1)
    once_each(trace, {*labels, "late"})
    assert all(worker.alive for worker in workers)
    assert submitter.value(submitter.send(ADD, 1, 2)) == 3
    late.platform.sending.close()
    late.platform.engine.dispose()
    late.close()


def test_a_worker_waits_for_a_broker_that_is_not_there_yet(
    platform: Platform, submitter: Submitter, broker: Server
) -> None:
    broker.kill()
    job = submitter.send(ADD, 1, 2)
    worker = platform.worker("a", 2, "prefork", ready=False)
    worker.wait_for("Cannot connect to redis")
    broker.start()
    assert submitter.value(job) == 3


# -- the ledger is away


@pytest.fixture
def own_ledger(broker: Server, tmp_path: Path) -> Iterator[Platform]:
    """Yield a platform whose ledger may be killed, since nobody else uses its servers."""
    with servers.private_pair(durable=False) as pair:
        running = valkey.running(Path(str(pair.data)) / "redis")
        assert running is not None and running.kill()
        port = OUTGOING - 15_001 - os.getpid() % 5_000
        pair = Pair(
            valkey.start(Path(str(pair.data)) / "redis", port, durable=False).url,
            pair.database_url,
            0,
            pair.postgres_pid,
            data=pair.data,
        )
        with platform_with_broker(pair, tmp_path, broker.url) as platform:
            platform.folder = Path(str(pair.data))
            yield platform


def test_a_ledger_that_dies_and_comes_back_empty_loses_and_doubles_nothing(
    own_ledger: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform, trace = own_ledger, tmp_path / "trace"
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)
    submitter = Submitter(platform)
    workers = [platform.worker("a", 2, "prefork"), platform.worker("b", 2, "threads")]
    labels = [str(number) for number in range(60)]
    folder = platform.folder / "redis"
    for number, label in enumerate(labels):
        if number == 20:
            server = valkey.running(folder)
            assert server is not None and server.kill()
        submitter.send(WORK, str(trace), label, 0.05)
    assert sum(job_states(platform).values()) == len(labels)
    valkey.start(folder, int(urlsplit(str(platform.settings.redis_url)).port or 0), durable=False)
    all_succeeded(platform, len(labels))
    once_each(trace, set(labels))
    assert all(worker.alive for worker in workers)
    until(lambda: verify.check(platform.engine, platform.redis).holds, "the books are right")
    submitter.close()


def test_a_half_open_connection_of_the_ledger_queue_loses_nothing(
    platform: Platform, submitter: Submitter, proxied: Any
) -> None:
    path: Proxy = proxied(str(platform.settings.redis_url))
    worker = platform.worker("a", 2, "threads", REDIS_URL=path.url, CELERY_RESULT_BACKEND=path.url)
    assert submitter.value(submitter.send(ADD, 1, 1)) == 2
    path.swallow()
    job = submitter.send(ADD, 1, 2)
    worker.wait_for("ledger queue: the ledger's Redis does not answer")
    path.restore()
    assert submitter.value(job) == 3
    assert submitter.ended(job).attempt >= 1


# -- between


def test_job_of_a_sender_dead_after_its_commit_is_left_to_the_workers(
    platform: Platform, submitter: Submitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform.worker("a", 2, "threads")
    with monkeypatch.context() as dying:
        dying.setattr(SubmissionQueue, "add", lambda *_, **__: None)
        job = submitter.send(ADD, 1, 2)
    # The sweep brings the job in, or a listener that has just begun.
    assert submitter.value(job) == 3


def test_a_drain_hands_back_what_is_in_the_ledger_queue(platform: Platform, submitter: Submitter) -> None:
    first = platform.worker("a", 2, "prefork")
    os.killpg(first.pid, signal.SIGSTOP)
    # The worker's queue holds the jobs, and nobody reads it.
    jobs = [submitter.send(ADD, number, 1) for number in range(2)]
    queue = submitter.view("a")["queue"]
    until(lambda: {submitter.row(job).state for job in jobs} <= {"accepted", "admitted"}, "they are admitted")
    platform.worker("b", 2, "prefork")
    first.signal(signal.SIGTERM)
    os.killpg(first.pid, signal.SIGCONT)
    assert first.wait() == 0
    assert [submitter.value(job) for job in jobs] == [1, 2]
    assert {submitter.ended(job).losses for job in jobs} == {0}
    assert not platform.redis.exists(queue)


# -- what counts as the same server


@pytest.mark.parametrize(
    ("broker_url", "same"),
    [
        ("redis://10.0.0.1:6379/0", True),
        ("redis://10.0.0.1", True),
        ("redis://10.0.0.1/", True),
        ("redis://10.0.0.1:6379/1", False),
        ("redis://10.0.0.1:6380/0", False),
        ("redis://10.0.0.2:6379/0", False),
        ("rediss://10.0.0.1:6379/0", False),
        ("redis://user:secret@10.0.0.1:6379/0", False),
        ("redis://10.0.0.1:6379/0;redis://10.0.0.2:6379/0", False),
        ("amqp://guest@10.0.0.1:5672//", False),
    ],
)
def test_a_broker_is_the_ledgers_server_where_its_url_leads_there(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, broker_url: str, same: bool
) -> None:
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)
    apart = settings.with_urls("redis://10.0.0.1:6379/0", str(settings.database_url))
    app = install(Celery("apart", broker=broker_url, set_as_current=False), resolve=lambda _: apart)
    assert shares_ledger(app, apart) is same
    app.conf.broker_transport_options = {"global_keyprefix": "mine:"}
    assert shares_ledger(app, apart) is False
    app.close()


@pytest.mark.parametrize("url", ["memory://", "filesystem://", "sqla+sqlite:///x", "sqs://", "nonsense", "redis"])
def test_a_broker_that_workers_cannot_listen_to_is_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)
    apart = Settings.from_environ(
        {"REDIS_URL": str(settings.redis_url), "DATABASE_URL": str(settings.database_url), "CELERY_BROKER_URL": url}
    )
    app = install(Celery("apart", set_as_current=False), resolve=lambda _: apart)
    with pytest.raises(Unsupported, match="redis://"):
        _ = app.conf.broker_url
    app.close()
