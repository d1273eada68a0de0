"""The first start of `up`: interrupted at each of its moments, and refused where Postgres cannot be made."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from celery_capacity.platform.embedded import servers
from celery_capacity.platform.processes.supervisor import celery_command
from celery_capacity.routing.config.embedded import running_pair
from celery_capacity.routing.config.settings import Settings
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures.processes.left_over import until_nothing_is_left
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.processes.terminals import OpenTerminal, Terminal
from tests.fixtures.waiting import until


@pytest.fixture
def home() -> Iterator[Path]:
    """Yield a home that no server was made in, and that the system user of Postgres can reach."""
    with tempfile.TemporaryDirectory(prefix="home-") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder) / "state"
        servers.stop(Settings(home=Path(folder) / "state"))


def embedded(home: Path) -> dict[str, Any]:
    return {"REDIS_URL": "", "DATABASE_URL": "", "PLATFORM_HOME": str(home)}


def runs(name: str, home: Path) -> bool:
    """Return True if a program of this name works in the home."""
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if words and Path(words[0]).name == name and any(str(home) in word for word in words):
            return True
    return False


#: Moments of the first start, each with what there is to see of it. All is ready soon after the last. The imports come
#: before them (tests/unit/workers/test_interrupts.py).
MOMENTS: dict[str, Callable[[Terminal, Path], object]] = {
    "servers": lambda up, _: up.wait_for("First start: making"),
    "redis": lambda _, home: until(lambda: runs("valkey-server", home), "a Redis"),
    "initdb": lambda _, home: until(lambda: runs("initdb", home), "initdb"),
    "postgres": lambda _, home: until(lambda: runs("postgres", home), "a Postgres"),
    "tables": lambda up, _: up.wait_for("Started embedded servers"),
    "workers": lambda up, _: up.wait_for("Waiting until everything is ready"),
}


@pytest.mark.long
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_first_start_leaves_nothing(
    open_terminal: OpenTerminal, home: Path, mark: str, moment: str
) -> None:
    up = open_terminal(*celery_command("up", "--worker", "a=1", "--pool", "threads"), **embedded(home))
    MOMENTS[moment](up, home)
    up.press_ctrl_c()
    assert up.wait() == Exit.INTERRUPTED
    assert "Interrupted." in up.screen
    assert "Traceback" not in up.screen
    assert "Nothing that this start began runs any more." in up.screen
    until_nothing_is_left(mark)
    assert running_pair(home) is None


@pytest.mark.long
def test_an_interrupted_first_start_can_be_repeated(open_terminal: OpenTerminal, home: Path) -> None:
    first = open_terminal(*celery_command("up", "--worker", "a=1", "--pool", "threads"), **embedded(home))
    MOMENTS["initdb"](first, home)
    first.press_ctrl_c()
    assert first.wait() == Exit.INTERRUPTED
    second = open_terminal(*celery_command("up", "--worker", "a=1", "--pool", "threads"), **embedded(home))
    second.wait_for("Ctrl-C ends")
    second.press_ctrl_c()
    assert second.wait() == Exit.OK
    assert running_pair(home) is not None


@pytest.mark.long
def test_a_failed_start_ends_its_redis_and_says_what_to_do(platform: Platform, home: Path, mark: str) -> None:
    # The data of another version: Redis has started before Postgres is refused.
    data = home / "postgres" / "data"
    data.mkdir(parents=True)
    for folder in (home, home / "postgres"):
        folder.chmod(0o711)
    (data / "PG_VERSION").write_text("9\n")
    done = platform.celery("up", **embedded(home), TEST_MARK=mark)
    assert done.returncode == Exit.UNAVAILABLE
    assert "are of Postgres 9" in done.stderr
    assert "celery -A platform up" not in done.stderr
    until_nothing_is_left(mark)


@pytest.mark.long
def test_a_start_whose_worker_fails_ends_its_servers(platform: Platform, home: Path, mark: str) -> None:
    nowhere: dict[str, Any] = {"PLATFORM_REQUESTS": "/nowhere.toml"}
    done = platform.celery("up", "--worker", "a=1", seconds=240, **embedded(home), **nowhere, TEST_MARK=mark)
    assert done.returncode == Exit.FAILED, done.stderr
    assert "no worker became ready" in done.stderr
    assert "Nothing that this start began runs any more." in done.stderr
    until_nothing_is_left(mark)
