"""Signs of life of a worker: what its files and its messages to systemd say, and when."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from celery_capacity.workers.supervision.health import Health

#: Seconds since the epoch, long ago.
LONG_AGO = 1_000_000


class Loop:
    """A main loop that takes a turn when it is asked, unless it hangs."""

    hangs = False

    def __init__(self) -> None:
        self._turned = False

    def ask_turn(self) -> None:
        self._turned = not self.hangs

    def took_turn(self) -> bool:
        return self._turned


def notifier_of(watchdog: float | None = None) -> Mock:
    return Mock(wanted=True, watchdog=watchdog)


def told(notifier: Mock) -> list[str]:
    return [line for call in notifier.tell.call_args_list for line in call.args]


def is_touched(path: Path) -> bool:
    """Return True if the file was touched since the last call."""
    touched = path.exists() and path.stat().st_mtime != LONG_AGO
    if touched:
        os.utime(path, (LONG_AGO, LONG_AGO))
    return touched


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "health"


def test_both_files_are_touched_by_each_heartbeat_that_reached_the_store(folder: Path) -> None:
    health = Health(folder, Loop(), notifier_of())
    health.begin(10.0)
    for reached_at in (1.0, 2.0):
        health.beat(reached_at, False)
        assert is_touched(folder / "live") and is_touched(folder / "ready")


def test_live_alone_is_touched_while_the_store_is_away(folder: Path) -> None:
    health = Health(folder, Loop(), notifier_of())
    health.begin(10.0)
    health.beat(1.0, False)
    assert is_touched(folder / "live") and is_touched(folder / "ready")
    health.beat(1.0, False)
    assert is_touched(folder / "live") and not is_touched(folder / "ready")
    health.beat(2.0, False)
    assert is_touched(folder / "ready")


def test_nothing_is_touched_while_the_main_loop_hangs(folder: Path) -> None:
    loop, notifier = Loop(), notifier_of()
    health = Health(folder, loop, notifier)
    health.begin(10.0)
    health.beat(1.0, False)
    loop.hangs = True
    health.beat(2.0, False)  # the loop had taken the turn that it was asked for before
    assert is_touched(folder / "live")
    health.beat(3.0, False)
    assert not is_touched(folder / "live") and told(notifier).count("WATCHDOG=1") == 2


def test_a_worker_that_stops_is_not_ready_and_still_lives(folder: Path) -> None:
    notifier = notifier_of()
    health = Health(folder, Loop(), notifier)
    health.begin(10.0)
    health.beat(1.0, False)
    for reached_at in (2.0, 3.0):
        health.beat(reached_at, True)
    assert not (folder / "ready").exists() and is_touched(folder / "live")
    assert told(notifier).count("STOPPING=1") == 1
    health.end()
    assert not (folder / "live").exists() and told(notifier).count("STOPPING=1") == 1


def test_signs_of_a_former_process_are_removed(folder: Path) -> None:
    folder.mkdir()
    for name in ("live", "ready"):
        (folder / name).touch()
    Health(folder, Loop(), notifier_of()).begin(10.0)
    assert list(folder.iterdir()) == []


def test_systemd_hears_of_readiness_once_and_of_life_each_time() -> None:
    notifier = notifier_of()
    health = Health(None, Loop(), notifier)
    health.begin(10.0)
    health.beat(0.0, False)
    assert told(notifier) == ["WATCHDOG=1"]
    for reached_at in (1.0, 2.0):
        health.beat(reached_at, False)
    assert (told(notifier).count("READY=1"), told(notifier).count("WATCHDOG=1")) == (1, 3)


def test_watchdog_faster_than_heartbeats_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    Health(None, Loop(), notifier_of(watchdog=15.0)).begin(10.0)
    assert "WatchdogSec=15" in caplog.text


def test_folder_that_cannot_be_written_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    health = Health(tmp_path / "file", Loop(), notifier_of())
    health.begin(10.0)
    for reached_at in (1.0, 2.0):
        health.beat(reached_at, False)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "PLATFORM_HEALTH_DIR" in caplog.text


def test_a_worker_that_nobody_watches_asks_its_main_loop_for_nothing() -> None:
    loop, notifier = Mock(), Mock(wanted=False, watchdog=None)
    health = Health(None, loop, notifier)
    health.beat(1.0, False)
    assert not loop.took_turn.called and not notifier.tell.called
