"""Messages to systemd, on a real datagram socket as systemd has one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_capacity.workers.supervision.systemd import ALIVE, READY, Notifier


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(10)
        yield listener


def test_systemd_gets_the_lines_of_a_message_in_one_datagram(listener: socket.socket) -> None:
    Notifier({"NOTIFY_SOCKET": listener.getsockname()}).tell(READY, ALIVE)
    assert listener.recv(4096) == b"READY=1\nWATCHDOG=1"


@pytest.mark.skipif(not Path("/proc/net/unix").exists(), reason="abstract names are Linux's")
def test_systemd_gets_a_message_at_an_abstract_name() -> None:
    name = f"celery-capacity-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name)
        listener.settimeout(10)
        Notifier({"NOTIFY_SOCKET": f"@{name}"}).tell(ALIVE)
        assert listener.recv(4096) == b"WATCHDOG=1"


@pytest.mark.parametrize("path", ["", "vsock:2:1234", "relative"])
def test_nobody_is_told_where_systemd_does_not_listen(path: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "1000000"})
    notifier.tell(READY)
    assert (notifier.wanted, notifier.watchdog) == (False, None)


def test_a_socket_that_is_gone_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    for _ in range(3):
        notifier.tell(ALIVE)
    assert len(caplog.records) == 1
    assert "systemd hears nothing" in caplog.text


def test_a_full_socket_does_not_hold_up_the_worker(listener: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": listener.getsockname()})
    for _ in range(2_000):
        notifier.tell(ALIVE)
    assert listener.recv(4096) == b"WATCHDOG=1"


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "180000000"}, 180.0),
        ({"WATCHDOG_USEC": "180000000", "WATCHDOG_PID": str(os.getpid())}, 180.0),
        ({"WATCHDOG_USEC": "180000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_watchdog_is_the_time_that_systemd_named_for_this_process(
    environ: dict[str, str], seconds: float | None
) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/run/notify", **environ}).watchdog == seconds
