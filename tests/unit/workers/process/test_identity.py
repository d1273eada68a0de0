"""Proof that a worker is dead: only a process of this very boot whose pid and start nobody has any more."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from celery_capacity.routing.config import process_identity
from celery_capacity.routing.config.process_identity import PidSpace
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.store.worker_rows import WorkerRow
from celery_capacity.workers.process.identity import Identity, is_known_dead, nodename_of


def own_row() -> WorkerRow:
    """Return the row of a worker that is this process."""
    identity = Identity("a")
    return WorkerRow(
        name=identity.name,
        incarnation=identity.incarnation,
        cpus=1000,
        memory=2**30,
        capacity={},
        hostname=identity.hostname,
        pid=identity.pid,
        pid_space=identity.pid_space,
        start_ticks=identity.start_ticks,
        version=identity.version,
        started_at=identity.started_at,
    )


HERE = process_identity.pid_space()


@pytest.mark.parametrize(
    ("celery_name", "node_name", "expected"),
    [
        ("celery@box", "", "box@{host}"),
        ("w1@box", "", "w1@box"),
        ("w1@box", "w2", "w2@{host}"),
        ("w1", "", "w1@{host}"),
        ("celery@text", "", "text@{host}"),
    ],
)
def test_node_keeps_the_host_that_its_worker_is_named_with(celery_name: str, node_name: str, expected: str) -> None:
    settings = Settings.from_environ({"NODE_NAME": node_name} if node_name else {})
    assert nodename_of(settings, celery_name) == expected.format(host=socket.gethostname())


def test_own_process_is_not_dead() -> None:
    assert not is_known_dead(own_row(), HERE)


@pytest.mark.parametrize("step", [-3600.0, -5.0, 5.0, 3600.0])
def test_live_process_is_not_dead_after_a_step_of_the_wall_clock(step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    row = own_row()
    stepped = psutil.boot_time() + step
    # The kernel reports the time of its boot by the wall clock of now.
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: stepped)
    monkeypatch.setattr("psutil.boot_time", lambda: stepped)
    assert not is_known_dead(row, HERE)


def test_process_of_another_boot_is_never_known_to_be_dead() -> None:
    """Clones have one machine id and one host name, and each has a boot of its own."""
    row = replace(own_row(), pid_space=PidSpace(HERE.machine, "another boot:pid:[1]"), pid=2**22 + 1)
    assert not is_known_dead(row, HERE)


def test_process_of_another_machine_is_never_known_to_be_dead() -> None:
    row = replace(own_row(), pid_space=PidSpace("another machine", HERE.boot), pid=2**22 + 1)
    assert not is_known_dead(row, HERE)


def test_process_of_another_pid_namespace_is_never_known_to_be_dead() -> None:
    boot = HERE.boot.partition(":")[0]
    row = replace(own_row(), pid_space=PidSpace(HERE.machine, f"{boot}:pid:[1]"), pid=2**22 + 1)
    assert not is_known_dead(row, HERE)


def test_nothing_is_known_where_the_boot_is_unknown() -> None:
    nowhere = PidSpace(HERE.machine, "")
    assert not is_known_dead(replace(own_row(), pid_space=nowhere, pid=2**22 + 1), nowhere)


def test_process_whose_pid_nobody_has_is_dead() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert is_known_dead(replace(own_row(), pid=ended.pid), HERE)


def test_process_whose_pid_another_one_has_is_dead() -> None:
    row = own_row()
    assert row.start_ticks is not None
    assert is_known_dead(replace(row, start_ticks=row.start_ticks - 1), HERE)


def test_zombie_is_dead_and_stopped_process_is_not() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        row = replace(own_row(), pid=process.pid, start_ticks=process_identity.start_ticks(process.pid))
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert not is_known_dead(row, HERE)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert is_known_dead(row, HERE)


def test_live_process_is_not_dead_where_its_start_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start cannot be read where /proc hides the processes of other users, or does not exist."""
    row = own_row()
    monkeypatch.setattr(process_identity, "_stat", lambda _: None)
    assert not is_known_dead(row, HERE)
    monkeypatch.setattr(psutil, "Process", lambda pid: (_ for _ in ()).throw(psutil.NoSuchProcess(pid)))
    assert not is_known_dead(row, HERE)


def test_nothing_is_known_where_proc_is_of_another_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "readlink", lambda _: "1")
    assert process_identity.boot_id() == ""


def test_machine_id_stays_on_its_machine() -> None:
    path = next((path for path in process_identity.MACHINE_ID_FILES if path.exists()), None)
    digest = process_identity.machine_id()
    assert digest == process_identity.machine_id()
    assert path is None or Path(path).read_text().strip() not in (digest, "")
