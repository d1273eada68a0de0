"""Modules of tasks and amounts of workers on the command line of `up`, and what of them is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from celery_capacity.platform.processes.supervisor import celery_command
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.commanding import in_process
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.processes.terminals import OpenTerminal

TASKS = """
from celery import shared_task


@shared_task(name="{name}")
def task():
    return "{name} ran"
"""

#: An environment that names no modules.
NO_IMPORTS: dict[str, Any] = {"PLATFORM_IMPORTS": "", "PLATFORM_DASHBOARD": "127.0.0.1:0"}


def module(folder: Path, name: str) -> None:
    (folder / f"{name}.py").write_text(TASKS.format(name=name))


@pytest.mark.long
def test_modules_of_tasks_are_named_on_the_command_line(platform: Platform, submitter: Submitter) -> None:
    for name in ("first_tasks", "second_tasks", "third_tasks"):
        module(platform.folder, name)
    words = ("up", "first_tasks", "--include", "second_tasks", "--worker", "a=cpus:2,memory:3GiB,gpus:1,licence:2")
    environment = {**NO_IMPORTS, "PLATFORM_IMPORTS": "third_tasks"}
    running = platform.start("up", *words, "--pool", "threads", "--json", says='"workers"', **environment)
    started = json.loads(running.wait_for('"workers"'))
    assert [(w["name"], w["cpus"], w["memory"]) for w in started["workers"]] == [("a", 2, 3 * 2**30)]
    named = json.loads(platform.celery("cluster", "--json").stdout)["resources"]["named"]
    assert (named["gpus"]["total"], named["licence"]["total"]) == (1, 2)
    for name in ("first_tasks", "second_tasks", "third_tasks"):
        assert submitter.value(submitter.send(name)) == f"{name} ran"
    running.signal(signal.SIGINT)
    assert running.wait() == 0
    roots = [line for line in running.lines if "run as root" in line or "runs as root" in line]
    assert len(roots) == (1 if os.geteuid() == 0 else 0)
    assert not [line for line in running.lines if "superuser" in line]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("no_such_tasks",), Exit.USAGE, "there is no module 'no_such_tasks' in"),
        (("--include", "some_tasks.py"), Exit.USAGE, "without the ending: some_tasks"),
        (("a-b",), Exit.USAGE, "'a-b' is not the name of a module"),
        (("--worker", "a=memory:1GiB"), Exit.USAGE, "--worker a=cpus:8,memory:1GiB"),
        (("--worker", "a=1,memory:1024TiB", "--worker", "b=1"), Exit.FAILED, "no memory is left for the worker b"),
    ],
)
def test_a_wrong_word_is_refused_before_anything_starts(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: Exit, message: str
) -> None:
    module(platform.folder, "some_tasks")
    monkeypatch.chdir(platform.folder)
    done = in_process(platform.environment)("up", *words, **NO_IMPORTS)
    assert done.exit_code == code, done.stderr
    assert message in done.stderr
    assert list(platform.redis.scan_iter("worker:*")) == []


def test_a_missing_module_of_the_environment_is_refused(platform: Platform) -> None:
    done = in_process(platform.environment)("up", **{**NO_IMPORTS, "PLATFORM_IMPORTS": "no_such_tasks"})
    assert done.exit_code == Exit.CONFIGURATION
    assert "PLATFORM_IMPORTS names 'no_such_tasks'" in done.stderr


def test_a_missing_module_of_a_worker_is_refused_without_traceback(platform: Platform) -> None:
    done = platform.celery("worker", "--pool", "solo", "--include", "no_such_tasks", **NO_IMPORTS)
    assert done.returncode == Exit.CONFIGURATION
    assert "--include names 'no_such_tasks'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_the_table_fits_a_terminal_of_80_columns(open_terminal: OpenTerminal) -> None:
    words = ("up", "--worker", "worker-01=cpus:1,memory:3GiB,gpus:1", "--pool", "threads")
    up = open_terminal(*celery_command(*words), columns=80)
    screen = up.wait_for("Ctrl-C ends")
    table = screen[screen.index("Redis") :].splitlines()
    assert [line.split()[0] for line in table[:5]] == ["Redis", "Postgres", "worker-01", "beat", "JSON"]
    assert "postgresql+psycopg2" not in screen
    up.press_ctrl_c()
    assert up.wait() == Exit.OK


@pytest.mark.parametrize("words", [("-A", "film"), ("-A", "film:app")])
def test_up_refuses_the_app_of_a_user(platform: Platform, words: tuple[str, ...]) -> None:
    """Workers of the platform's own app would not know the tasks of that app."""
    (platform.folder / "film.py").write_text(
        "from celery import Celery\nfrom celery_capacity import install\napp = install(Celery('film'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "celery", *words, "up", "--json"],
        env={**platform.environment, **NO_IMPORTS},
        cwd=platform.folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == Exit.USAGE
    assert f"not of `-A {words[1]}`" in json.loads(done.stdout)["detail"]
