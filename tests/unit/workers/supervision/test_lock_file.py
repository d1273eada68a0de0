"""The lock file of a worker: when it proves that the worker is over, and when it proves nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from celery_capacity.routing.config import process_identity
from celery_capacity.workers.supervision import lock_file
from celery_capacity.workers.supervision.lock_file import KEPT, LockFile, is_local
from tests.fixtures.waiting import until

BOOT = process_identity.boot_id()

#: Holds the lock of the incarnation `former` in a folder, and says so.
HOLDING = """
import sys
from pathlib import Path
from celery_capacity.workers.supervision.lock_file import LockFile
lock = LockFile(Path(sys.argv[1]), "former", sys.argv[2])
lock.hold()
print("held", flush=True)
sys.stdin.read()
"""

#: Goes on in a fork, whose pid it says.
FORKING = """
import os
child = os.fork()
if child:
    print(child, flush=True)
    os._exit(0)
os.close(1)
sys.stdin.read()
"""


def row(boot: str = BOOT, incarnation: str = "former") -> Any:
    return SimpleNamespace(incarnation=incarnation, pid_space=SimpleNamespace(boot=boot))


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(folder), BOOT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def successor(folder: Path, boot: str = BOOT) -> LockFile:
    return LockFile(folder, "later", boot)


def test_killed_process_is_proved_to_be_over_and_a_live_one_is_not(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        assert not successor(tmp_path).proves_end(row())
    finally:
        end(process)
    assert successor(tmp_path).proves_end(row())


def test_stopped_process_is_not_over(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        os.kill(process.pid, 19)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert not successor(tmp_path).proves_end(row())
    finally:
        end(process)


def test_worker_in_another_namespace_of_this_boot_is_proved_to_be_over(tmp_path: Path) -> None:
    end(holder(tmp_path))
    kernel = BOOT.partition(":")[0]
    assert successor(tmp_path, f"{kernel}:pid:[2]").proves_end(row(f"{kernel}:pid:[1]"))


def test_worker_of_another_boot_is_never_proved_to_be_over(tmp_path: Path) -> None:
    """The disk may be a copy, or another machine may have it too."""
    end(holder(tmp_path))
    assert not successor(tmp_path).proves_end(row("another boot:pid:[1]"))
    assert not successor(tmp_path, "another boot:pid:[1]").proves_end(row("another boot:pid:[1]"))
    assert not successor(tmp_path, "").proves_end(row(""))


def test_copy_of_the_folder_proves_nothing_of_a_live_worker(tmp_path: Path) -> None:
    """A second worker may have a copy of all that the first one has."""
    folder, copied = tmp_path / "locks", tmp_path / "copied"
    process = holder(folder)
    try:
        shutil.copytree(folder, copied)
        assert not successor(copied).proves_end(row())
    finally:
        end(process)
    assert not successor(copied).proves_end(row())


def test_link_to_another_file_proves_nothing(tmp_path: Path) -> None:
    end(holder(tmp_path))
    (tmp_path / "former.lock").rename(tmp_path / "elsewhere")
    (tmp_path / "former.lock").symlink_to("elsewhere")
    assert not successor(tmp_path).proves_end(row())


def test_worker_without_a_file_or_a_folder_is_not_over(tmp_path: Path) -> None:
    assert not successor(tmp_path).proves_end(row())
    without = LockFile(None, "later", BOOT)
    without.hold()
    without.remove()
    assert not without.proves_end(row())


def test_file_is_locked_from_the_moment_that_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def rename(path: Path, target: Path) -> Path:
        seen.append((target.exists(), successor(tmp_path).proves_end(row(incarnation="first"))))
        os.rename(path, target)
        seen.append((target.exists(), successor(tmp_path).proves_end(row(incarnation="first"))))
        return target

    monkeypatch.setattr(Path, "rename", rename)
    LockFile(tmp_path, "first", BOOT).hold()
    assert seen == [(False, False), (True, False)]


def test_fork_of_a_worker_keeps_its_lock(tmp_path: Path) -> None:
    """A pool that outlives its main process still runs jobs."""
    forking = HOLDING.partition("print")[0] + FORKING
    done = subprocess.Popen(
        [sys.executable, "-c", forking, str(tmp_path), BOOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert done.stdout is not None and done.stdin is not None
    done.stdout.readline()
    assert done.wait(60) == 0
    assert not successor(tmp_path).proves_end(row())
    done.stdin.close()  # the child ends
    until(lambda: successor(tmp_path).proves_end(row()), "the lock ends with the last process")


def test_worker_that_left_takes_its_file_away(tmp_path: Path) -> None:
    lock = LockFile(tmp_path, "first", BOOT)
    lock.hold()
    lock.hold()
    assert [path.name for path in tmp_path.iterdir()] == ["first.lock"]
    lock.remove()
    assert list(tmp_path.iterdir()) == []


def test_files_of_workers_that_died_long_ago_are_removed(tmp_path: Path) -> None:
    end(holder(tmp_path))
    long_ago = time.time() - KEPT - 60
    os.utime(tmp_path / "former.lock", (long_ago, long_ago))
    alive = LockFile(tmp_path, "alive", BOOT)
    alive.hold()
    os.utime(tmp_path / "alive.lock", (long_ago, long_ago))
    LockFile(tmp_path, "later", BOOT).hold()
    assert {path.name for path in tmp_path.iterdir()} == {"alive.lock", "later.lock"}


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs", "9p", "overlay"])
def test_file_system_that_is_not_certainly_local_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    end(holder(tmp_path))
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 8:2 / {tmp_path} rw shared:1 - {kind} server:/x rw\n", encoding="utf-8"
    )
    monkeypatch.setattr(lock_file, "MOUNTS", mounts)
    assert not successor(tmp_path).proves_end(row())
    successor(tmp_path).hold()
    assert "proves nothing" in caplog.text
    assert not (tmp_path / "later.lock").exists()


def test_mount_is_the_deepest_and_the_latest_of_its_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    monkeypatch.setattr(lock_file, "MOUNTS", mounts)
    spaced = tmp_path / "a b"
    spaced.mkdir()
    escaped = str(spaced).replace(" ", "\\040")
    mounts.write_text(
        f"1 0 8:1 / / rw - nfs a rw\n2 1 8:2 / {escaped} rw - nfs b rw\n3 1 8:3 / {escaped} rw - ext4 c rw\n"
    )
    assert is_local(spaced)
    assert not is_local(tmp_path)
    mounts.unlink()
    assert not is_local(spaced)


@pytest.mark.parametrize("name", [b"donn\xc3\xa9es", b"a\xc3\xa9 b\\c", b"\xe2\x80\xa8\xc2\xa0", b"\xff", b"\\x41"])
def test_mount_with_any_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes) -> None:
    mounts, shared = tmp_path / "mountinfo", tmp_path / os.fsdecode(name)
    monkeypatch.setattr(lock_file, "MOUNTS", mounts)
    shared.mkdir()
    escaped = os.fsencode(shared).replace(b"\\", b"\\134").replace(b" ", b"\\040")
    mounts.write_bytes(b"1 0 8:1 / / rw - ext4 a rw\n2 1 8:2 / " + escaped + b" rw - nfs4 server:/x rw\n")
    assert is_local(tmp_path)
    assert not is_local(shared)


def test_folder_that_cannot_be_written_is_logged_and_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    LockFile(tmp_path / "file", "first", BOOT).hold()
    assert "PLATFORM_LOCK_DIR" in caplog.text


def test_failure_leaves_no_open_file_and_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    lock = LockFile(tmp_path, "first", BOOT)
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        for _ in range(5):
            lock.hold()
    assert len(os.listdir("/proc/self/fd")) == before
    assert caplog.text.count("No space left") == 1
    assert list(tmp_path.iterdir()) == []
    lock.hold()
    assert [path.name for path in tmp_path.iterdir()] == ["first.lock"]


def test_file_system_that_is_not_local_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock_file, "is_local", lambda _: False)
    lock = LockFile(tmp_path, "first", BOOT)
    lock.hold()
    lock.hold()
    assert caplog.text.count("proves nothing") == 1
