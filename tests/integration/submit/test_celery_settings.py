"""Celery as the user configured it.

These tests show which settings the platform sets, which it leaves alone, and which it does not carry out yet. The last
kind is refused, never ignored.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery import Celery, group
from celery.app.amqp import AMQP
from sqlalchemy import text

from celery_capacity import NotAccepted, PlatformError, Unsupported, create_app, install
from celery_capacity.routing.config.settings import Settings
from celery_capacity.workers.broker import beat_messages
from celery_capacity.workers.process.stores import platform_of
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import READY, Platform, Process
from tests.fixtures.waiting import until
from tests.tasks import canvas

ADD = "tests.fixtures.tasks.add"


@pytest.fixture
def app(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "REDIS_URL", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    app = create_app("theirs", resolve=lambda _: settings)
    yield app
    app.close()


def jobs(platform: Platform) -> list[Any]:
    with platform.engine.connect() as connection:
        return list(connection.execute(text("SELECT name, state, attempt, priority FROM jobs ORDER BY seq")))


# -- the platform's defaults, and the user's own


def test_the_defaults_are_those_that_the_evidence_asks_for(app: Celery, settings: Settings) -> None:
    conf = app.conf
    assert (conf.broker_url, conf.result_backend) == (settings.redis_url, settings.redis_url)
    assert conf.accept_content == conf.result_accept_content == ["json"]
    assert (conf.task_serializer, conf.result_serializer) == ("json", "json")
    assert (conf.task_acks_late, conf.task_reject_on_worker_lost) == (False, False)
    assert (conf.worker_prefetch_multiplier, conf.worker_disable_rate_limits) == (0, True)
    assert (conf.broker_channel_error_retry, conf.broker_connection_retry_on_startup) == (True, True)
    assert conf.broker_connection_max_retries is None
    assert (conf.result_backend_always_retry, conf.result_backend_max_retries) == (True, 9)
    transport = conf.broker_transport_options
    assert (transport["socket_timeout"], transport["socket_connect_timeout"]) == (5.0, 3.0)
    assert (transport["health_check_interval"], transport["socket_keepalive"]) == (60, True)
    assert {entry["task"] for entry in conf.beat_schedule.values()} == set(beat_messages.NAMES)


@pytest.mark.skipif(sys.platform != "linux", reason="the names of these options are Linux's")
def test_broker_connection_is_found_dead_in_seconds(app: Celery) -> None:
    with app.connection_for_read() as connection:
        channel: Any = connection.default_channel
        opened = channel.pool.get_connection()
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        assert opened._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert [opened._sock.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [5, 2, 3]


def test_the_users_own_settings_win_and_his_schedule_keeps_the_ticks(settings: Settings) -> None:
    app = create_app("theirs", resolve=lambda _: settings, worker_prefetch_multiplier=3, task_serializer="yaml")
    app.conf.beat_schedule = {"mine": {"task": "mine", "schedule": 60.0}}
    app.finalize()
    assert (app.conf.worker_prefetch_multiplier, app.conf.task_serializer) == (3, "yaml")
    assert set(app.conf.beat_schedule) == {"mine", *beat_messages.beat_entries(settings)}
    app.close()


def test_an_existing_app_keeps_its_own_classes(settings: Settings) -> None:
    class TheirAMQP(AMQP):
        """AMQP class of the user's app."""

    app = Celery("existing", amqp=TheirAMQP, set_as_current=False)
    _ = app.amqp, app.control

    @app.task(cpus=2)
    def mine() -> None:
        """Do nothing, as a task that was defined before `install`."""

    assert install(app, resolve=lambda _: settings) is app
    assert install(app) is app
    assert isinstance(app.amqp, TheirAMQP)
    assert platform_of(app).settings is settings
    assert mine.cpus == 2
    app.close()


def test_an_app_that_is_not_on_the_platform_says_so() -> None:
    app = Celery("elsewhere", set_as_current=False)
    with pytest.raises(PlatformError, match=r"celery_capacity\.install"):
        platform_of(app)


def test_a_project_of_its_own_has_schedule_routes_and_ticks(platform: Platform, submitter: Submitter) -> None:
    environment = {**platform.environment, "PLATFORM_IMPORTS": "", "PLATFORM_RESOURCES": "own=4"}
    environment |= {"PLATFORM_CPUS": "8", "PLATFORM_RENEW_INTERVAL": "5", "PLATFORM_HEARTBEAT_INTERVAL": "0.4"}

    def start(*arguments: str, says: str) -> Process:
        command = [sys.executable, "-m", "celery", "-A", "tests.tasks.own", *arguments, "--loglevel", "INFO"]
        process = Process(arguments[0], command, environment, platform.folder)
        platform.processes.append(process)
        process.wait_for(says)
        return process

    worker = start("worker", "--pool", "threads", "-n", "own@%h", says=READY)
    first = submitter.view("own")["heartbeat_at"]
    beat = start("beat", "--schedule", str(platform.folder / "schedule"), says="beat: Starting...")
    until(lambda: [row.state for row in jobs(platform)].count("succeeded") >= 3, "what is scheduled runs")
    assert {row.name for row in jobs(platform)} == {"tests.tasks.own.heavy"}
    until(lambda: submitter.view("own")["heartbeat_at"] > first, "beat ticks")
    assert beat.stop() == 0
    sent = subprocess.run(
        [sys.executable, "-c", "from tests.tasks.own import who; print(who.delay().get(timeout=60))"],
        env=environment,
        cwd=platform.folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert sent.stdout.strip() == "own", sent.stderr
    assert jobs(platform)[-1].priority == 7
    until(lambda: submitter.allocated_cpus() == "0", "all is given back")
    assert not any("mingle" in line or "sync with" in line for line in worker.lines)


def test_a_time_without_a_zone_is_in_that_of_the_app(platform: Platform, submitter: Submitter) -> None:
    submitter.app.conf.timezone = "Asia/Tokyo"
    soon = datetime.now(UTC) + timedelta(minutes=5)
    naive = soon.astimezone(ZoneInfo("Asia/Tokyo")).replace(tzinfo=None)
    row = submitter.row(submitter.app.send_task(ADD, [1, 2], eta=naive, expires=naive).id)
    assert (row.due_at, row.expires_at) == (soon, soon)
    submitter.app.control.revoke(row.id)


# -- what goes on to work


def test_chains_groups_and_chords_are_made_of_jobs(platform: Platform, submitter: Submitter) -> None:
    platform.environment["PLATFORM_IMPORTS"] += f",{canvas.__name__}"
    platform.worker("a", 4, "threads")
    tasks = submitter.app.tasks
    add, total = tasks[ADD], tasks[canvas.total.name]
    assert (add.s(1, 2) | add.s(3) | add.s(4)).apply_async().get(timeout=60) == 10
    assert group(add.s(number, number) for number in range(3)).apply_async().get(timeout=60) == [0, 2, 4]
    assert (group(add.s(number, 1) for number in range(3)) | total.s()).apply_async().get(timeout=60) == 6
    assert tasks[canvas.late.name].delay(5).get(timeout=60) == 5
    replaced = tasks[canvas.replaced.name].delay(1)
    assert replaced.get(timeout=60) == 101
    assert submitter.ended(replaced.id).state == "succeeded"
    again = tasks[canvas.again_by_itself.name].delay()
    assert submitter.ended(again.id).state == "failed"
    assert submitter.outcomes(again.id) == ["retried", "failed"]
    until(lambda: {row.state for row in jobs(platform)} == {"succeeded", "failed"}, lambda: jobs(platform))
    assert len(jobs(platform)) == 3 + 3 + 4 + 1 + 1 + 1


def test_recycled_processes_lose_nothing(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", 2, "prefork", arguments=("--max-tasks-per-child", "1"))
    sent = [submitter.send(ADD, number, 1) for number in range(12)]
    assert [submitter.value(job) for job in sent] == list(range(1, 13))
    assert {(row.state, row.attempt, row.losses) for row in map(submitter.ended, sent)} == {("succeeded", 1, 0)}


def test_a_program_that_forks_sends_from_all_its_processes(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", 2, "threads")
    program = f"""
import os
from celery_capacity import create_app
app = create_app()
app.send_task({ADD!r}, [0, 0])
for child in range(3):
    if os.fork() == 0:
        for number in range(5):
            app.send_task({ADD!r}, [child, number], task_id=f"{{child}}-{{number}}")
        os._exit(0)
for _ in range(3):
    assert os.wait()[1] == 0
app.send_task({ADD!r}, [0, 0])
"""
    command = [sys.executable, "-c", program]
    subprocess.run(command, env=platform.environment, cwd=platform.folder, timeout=60, check=True)
    assert len(jobs(platform)) == 17
    assert [submitter.value(f"{child}-{number}") for child in range(3) for number in range(5)] == [
        child + number for child in range(3) for number in range(5)
    ]
    until(lambda: {row.state for row in jobs(platform)} == {"succeeded"}, lambda: jobs(platform))


def test_events_are_sent_of_every_step(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", 1, "prefork", arguments=("--task-events",))
    seen: list[str] = []
    with submitter.app.connection() as connection:
        receiver = submitter.app.events.Receiver(connection, handlers={"*": lambda event: seen.append(event["type"])})
        listener = threading.Thread(target=receiver.capture, daemon=True)
        listener.start()

        def hears() -> list[str]:
            # Redis may get the question of `capture` before its subscription: then the answer reaches nobody.
            receiver.wakeup_workers()
            return seen

        until(hears, "the worker answers the receiver's wake-up")
        for task, arguments in ((ADD, (1, 1)), ("tests.fixtures.tasks.fail", ("x",))):
            submitter.ended(submitter.send(task, *arguments))
        until(lambda: {"task-succeeded", "task-failed"} <= set(seen), lambda: f"the events came: {seen}")
        receiver.should_stop = True
        listener.join()
    assert [kind for kind in seen if kind.startswith("task-")] == [
        *("task-admitted", "task-received", "task-started", "task-succeeded"),
        *("task-admitted", "task-received", "task-started", "task-failed"),
    ]


# -- what is refused


def test_a_broker_that_no_worker_can_listen_to_is_refused(platform: Platform) -> None:
    done = platform.celery("worker", "--pool", "solo", CELERY_BROKER_URL="sqs://key:secret@")
    assert done.returncode != 0
    assert "a broker with sqs:// is not supported" in done.stderr
    assert "secret" not in done.stderr


def test_an_id_that_has_ended_is_not_published_again_as_a_successor(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", 1, "solo")
    job = submitter.app.send_task(ADD, [1, 2], task_id="mine").id
    assert submitter.value(job) == 3
    submitter.ended(job)
    # A repeated publish with this id is recognised, and changes nothing.
    assert submitter.app.send_task(ADD, [5, 6], task_id="mine").id == "mine"
    assert submitter.value(job) == 3
    with pytest.raises((Unsupported, NotAccepted), match="new task_id"):
        submitter.app.send_task(ADD, [1, 2], task_id="mine", retries=1)
    assert len(jobs(platform)) == 1
