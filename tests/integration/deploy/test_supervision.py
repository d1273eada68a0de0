"""A worker and the system that runs it: its signs of life, and its end within a time, on real processes."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import redis

from tests.fixtures import tasks as held
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform, Pool
from tests.fixtures.waiting import until

#: Time of a file that nobody has touched since, in seconds since the epoch.
LONG_AGO: Final = 1_000_000

#: A command by remote control that keeps the main loop until a file is there.
HANGING: Final = """
import pathlib, time
from celery.worker.control import control_command

@control_command(args=[("path", str)])
def hang(state, path):
    while not pathlib.Path(path).exists():
        time.sleep(0.01)
"""


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """Yield the socket on which systemd listens to a service."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(30)
        yield listener


def hear(listener: socket.socket, line: str) -> None:
    """Wait for a message with this line."""
    while line not in listener.recv(4096).decode().splitlines():
        continue


def is_touched_anew(path: Path) -> bool:
    """Wait until a file is touched; call it again for the next time."""
    until(path.exists, f"{path.name} is there")
    os.utime(path, (LONG_AGO, LONG_AGO))
    return bool(until(lambda: path.stat().st_mtime != LONG_AGO, f"{path.name} is touched"))


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
def test_worker_shows_that_it_lives_and_is_ready(
    platform: Platform, listener: socket.socket, tmp_path: Path, pool: Pool
) -> None:
    folder = tmp_path / "health"
    worker = platform.worker(
        "a", 2, pool, PLATFORM_HEALTH_DIR=str(folder), NOTIFY_SOCKET=listener.getsockname(), PLATFORM_IMPORTS=""
    )
    hear(listener, "READY=1")
    hear(listener, "WATCHDOG=1")
    assert is_touched_anew(folder / "live") and is_touched_anew(folder / "ready")
    assert worker.stop() == 0
    hear(listener, "STOPPING=1")
    assert list(folder.iterdir()) == []


def test_body_in_the_main_loop_is_a_sign_of_life(
    platform: Platform, submitter: Submitter, redis_client: redis.Redis, tmp_path: Path
) -> None:
    folder = tmp_path / "health"
    platform.worker("a", 1, "solo", PLATFORM_HEALTH_DIR=str(folder))
    job = submitter.send("tests.fixtures.tasks.hold", "gate")
    held.started(redis_client, "gate")
    # Twice: the loop may have taken the turn before the body began.
    assert is_touched_anew(folder / "live") and is_touched_anew(folder / "live") and is_touched_anew(folder / "ready")
    held.let_go(redis_client, "gate")
    assert submitter.ended(job).state == "succeeded"


def test_worker_whose_main_loop_hangs_gives_no_sign_of_life(
    platform: Platform, submitter: Submitter, tmp_path: Path
) -> None:
    folder, gate = tmp_path / "health", tmp_path / "gate"
    (tmp_path / "hanging.py").write_text(HANGING)
    worker = platform.worker("a", 1, "prefork", PLATFORM_HEALTH_DIR=str(folder), PLATFORM_IMPORTS="hanging")
    assert is_touched_anew(folder / "live")
    submitter.app.control.broadcast("hang", {"path": str(gate)})
    renewed = float(platform.environment.get("PLATFORM_RENEW_INTERVAL", "10"))

    def silent() -> bool:
        os.utime(folder / "live", (LONG_AGO, LONG_AGO))
        try:
            until(lambda: (folder / "live").stat().st_mtime != LONG_AGO, "live is touched", seconds=5 * renewed)
        except AssertionError:
            return True
        return False

    until(silent, "the worker hangs")
    assert worker.alive
    gate.touch()
    assert is_touched_anew(folder / "live")


@pytest.mark.parametrize("pool", ["prefork", "gevent", "threads"])
def test_what_outlasts_the_grace_is_handed_back_and_is_no_loss(
    platform: Platform, submitter: Submitter, redis_client: redis.Redis, pool: Pool
) -> None:
    worker = platform.worker("a", 2, pool, PLATFORM_SHUTDOWN_GRACE="3")
    long = submitter.send("tests.fixtures.tasks.hold", "long", cpus=1)
    held.started(redis_client, "long")
    short = submitter.send("tests.fixtures.tasks.hold", "short", cpus=1)
    held.started(redis_client, "short")
    worker.signal(signal.SIGTERM)
    worker.wait_for("Warm shutdown")
    held.let_go(redis_client, "short")
    assert submitter.ended(short).state == "succeeded"
    assert submitter.outcomes(short) == ["succeeded"]
    worker.wait_for("PLATFORM_SHUTDOWN_GRACE is over")
    assert worker.wait(60) == 0
    platform.worker("b", 2, "threads")
    held.started(redis_client, "long")
    held.let_go(redis_client, "long")
    row = submitter.ended(long)
    assert (row.state, row.worker, row.losses) == ("succeeded", "b", 0)
    assert submitter.outcomes(long) == ["handed_back", "succeeded"]


def test_grace_holds_for_a_shutdown_by_remote_control(
    platform: Platform, submitter: Submitter, redis_client: redis.Redis
) -> None:
    worker = platform.worker("a", 1, "prefork", PLATFORM_SHUTDOWN_GRACE="2")
    job = submitter.send("tests.fixtures.tasks.hold", "long", cpus=1)
    held.started(redis_client, "long")
    submitter.app.control.shutdown()
    worker.wait_for("PLATFORM_SHUTDOWN_GRACE is over")
    assert worker.wait(60) == 0
    until(lambda: submitter.outcomes(job) == ["handed_back"], "it is handed back")
    assert submitter.row(job).losses == 0


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_signal_after_a_cold_stop_costs_no_attempt(
    platform: Platform, submitter: Submitter, redis_client: redis.Redis, pool: Pool
) -> None:
    worker = platform.worker("a", 1, pool)
    job = submitter.send("tests.fixtures.tasks.hold", "long", cpus=1)
    held.started(redis_client, "long")
    worker.signal(signal.SIGQUIT)
    # Each moment of the end is met by one of them, whatever the machine does meanwhile.
    while worker.alive:
        worker.signal(signal.SIGTERM)
        time.sleep(0.005)
    until(lambda: submitter.outcomes(job) == ["handed_back"], "it is handed back")
    assert submitter.row(job).losses == 0


def test_a_worker_without_long_jobs_does_not_wait_for_the_grace(platform: Platform) -> None:
    worker = platform.worker("a", 2, "prefork", PLATFORM_SHUTDOWN_GRACE="3600")
    worker.signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    assert not [line for line in worker.lines if "PLATFORM_SHUTDOWN_GRACE" in line]
