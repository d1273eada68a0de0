"""Celery's own commands, run as a person runs them: they work on the platform and show its true state."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import PATIENCE, READY, Platform
from tests.fixtures.waiting import until

ADD = "tests.fixtures.tasks.add"

#: Modules of a project, in a folder of its own.
MODULES = {
    "by_option": "from celery import shared_task\n@shared_task(cpus=0.5)\ndef one():\n    return 'by -I'\n",
    "by_setting": "from celery import shared_task\n@shared_task(cpus=1.5)\ndef two():\n    return 'by setting'\n",
}


@pytest.fixture
def pidfiles(platform: Platform) -> Iterator[Path]:
    """Yield the folder for the pid files of detached processes. At the end, kill every process that is left."""
    folder = platform.folder / "run"
    folder.mkdir()
    yield folder
    for file in folder.glob("*.pid"):
        with suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


def says(log: Path, text: str = READY) -> str:
    """Return the contents of a log as soon as it has this text."""

    def found() -> str:
        content = log.read_text(encoding="utf-8") if log.exists() else ""
        return content if text in content else ""

    return until(found, f"{log.name} has {text!r}")


def test_detached_worker_takes_modules_and_hears_the_commands(
    platform: Platform, submitter: Submitter, pidfiles: Path
) -> None:
    project = platform.folder / "project"
    project.mkdir()
    for name, code in MODULES.items():
        (project / f"{name}.py").write_text(code, encoding="utf-8")
    pidfile, log = pidfiles / "w.pid", platform.folder / "w.log"
    worker = ("worker", "--detach", f"--pidfile={pidfile}", f"--logfile={log}", "--loglevel", "INFO", "-P", "threads")
    detached = platform.celery(
        *("--workdir", str(project), *worker, "-I", "by_option"),
        NODE_NAME="w",
        PLATFORM_CPUS="2",
        PLATFORM_IMPORTS="by_setting,tests.fixtures.tasks",
    )
    assert detached.returncode == 0, detached.stderr
    says(log)
    pid = int(pidfile.read_text())
    for name, cpus, value in (("by_option.one", 0.5, "by -I"), ("by_setting.two", 1.5, "by setting")):
        job = submitter.send(name)
        assert submitter.value(job) == value
        assert submitter.row(job).request["cpus"] == cpus
    added = submitter.send(ADD, 40, 2)
    assert submitter.value(added) == 42
    commands = {
        "status": ("status",),
        "call": ("call", ADD, "--args", "[1, 2]"),
        "result": ("result", added),
        "report": ("report",),
        "graph workers": ("graph", "workers"),
        "graph bootsteps": ("graph", "bootsteps"),
        "list": ("list", "bindings"),
    }
    with ThreadPoolExecutor(3) as pool:
        # The commands use the name of the running worker. A look at a worker's options starts no worker.
        running = {name: pool.submit(platform.celery, *command, NODE_NAME="w") for name, command in commands.items()}
        line = f"print('it is', app.send_task({ADD!r}, (5, 6), cpus=2).get(timeout=60))"
        shell = pool.submit(in_shell, platform, line)
        done = {name: future.result() for name, future in running.items()}
    for name, command in done.items():
        assert command.returncode == 0, f"{name}: {command.stdout}{command.stderr}"
    out = {name: command.stdout for name, command in done.items()}
    assert "w@" in out["status"]
    assert "1 node online" in out["status"]
    assert submitter.value(out["call"].split()[-1]) == 3
    assert out["result"].split()[-1] == "42"
    assert "celery:5.7" in out["report"]
    assert "worker_consumer: 'celery_capacity.workers.execute.consumer:Consumer'" in out["report"]
    assert re.search(r'"w@\S+"', out["graph workers"])
    assert '"Pool"' in out["graph bootsteps"]
    assert "celery" in out["list"]
    assert "it is 11" in shell.result()
    # The pid file names the running worker, keeps a second one away, and goes with it.
    second = platform.celery(*worker, NODE_NAME="w")
    assert "already exists" in second.stdout + second.stderr
    assert int(pidfile.read_text()) == pid
    os.kill(pid, signal.SIGTERM)
    until(lambda: not pidfile.exists(), "the pid file is gone")
    until(lambda: not platform.redis.exists("worker:w"), "the worker has left")


def in_shell(platform: Platform, line: str) -> str:
    """Return the output of `celery shell` after this line is typed into it."""
    shell = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "platform", "shell", "--python"],
        env=platform.environment,
        cwd=platform.folder,
        input=f"{line}\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return shell.stdout + shell.stderr


@pytest.mark.long
def test_multi_starts_restarts_and_stops_workers_by_their_names(
    platform: Platform, submitter: Submitter, pidfiles: Path
) -> None:
    options = (f"--pidfile={pidfiles}/%n.pid", f"--logfile={platform.folder}/%n%I.log", "-l", "INFO", "-c", "1")
    platform.environment["PLATFORM_CPUS"] = "1"
    started = platform.celery("multi", "start", "one", "two", *options)
    assert started.returncode == 0, started.stdout + started.stderr
    for name in ("one", "two"):
        says(platform.folder / f"{name}.log")
    first = (pidfiles / "one.pid").read_text()
    jobs = [submitter.send(ADD, number, 1) for number in range(4)]
    assert [submitter.value(job) for job in jobs] == [1, 2, 3, 4]
    assert {submitter.ended(job).worker for job in jobs} <= {"one", "two"}
    assert sorted(platform.redis.keys("worker:*")) == [b"worker:one", b"worker:two"]
    restarted = platform.celery("multi", "restart", "one", *options)
    assert restarted.returncode == 0, restarted.stdout + restarted.stderr
    until(lambda: (platform.folder / "one.log").read_text(encoding="utf-8").count(READY) == 2, "one is back")
    assert (pidfiles / "one.pid").read_text() != first
    stopped = platform.celery("multi", "stopwait", "one", "two", *options)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert not list(pidfiles.iterdir())
    assert not platform.redis.keys("worker:*")
