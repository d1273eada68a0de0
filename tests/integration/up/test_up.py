"""`up` and `down`: the processes that they start, their output, and their ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, run
from typing import Any

import psutil
import pytest
from sqlalchemy import text

from celery_capacity.routing.config.embedded import running_pair
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures.documents.shapes import assert_shape
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform, Process
from tests.fixtures.waiting import until

#: Seconds for steps that take far less, on a busy machine.
PATIENCE = 60.0

SLEEP = "demo.sleep"

#: Program of another user: it submits, waits for the result, and prints the name of the worker that ran the job.
SUBMIT = """
import sys
from celery_capacity import create_app
result = create_app().send_task("demo.sleep", args=[0.01], cpus=float(sys.argv[1]))
print(result.get(timeout=60)["worker"])
"""


def up(platform: Platform, *arguments: str, **environment: Any) -> tuple[Process, dict[str, Any]]:
    """Start `up --json`, and return its process and the line that it prints when all of it is ready."""
    running = platform.start(
        "up", "up", "--json", *arguments, says='"workers"', **{"PLATFORM_DASHBOARD": "127.0.0.1:0", **environment}
    )
    return running, json.loads(running.wait_for('"workers"'))


def submit(platform: Platform, cpus: float, **environment: str) -> str:
    """Return the worker that ran a job of another user's program."""
    done = run(
        [sys.executable, "-c", SUBMIT, str(cpus)],
        env={**platform.environment, **environment},
        cwd=platform.folder,
        stdout=PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


def state(platform: Platform, job: str) -> str:
    with platform.engine.connect() as connection:
        return str(connection.execute(text("SELECT state FROM jobs WHERE id = :id"), {"id": job}).scalar_one())


def until_state(platform: Platform, job: str, wanted: str) -> None:
    until(lambda: state(platform, job) == wanted, lambda: f"{job} {wanted}; it is {state(platform, job)}")


def pids(said: dict[str, Any]) -> list[int]:
    return [*(worker["pid"] for worker in said["workers"]), said["beat"]["pid"], said["dashboard"]["pid"]]


@pytest.mark.long
def test_it_runs_workers_beat_and_the_dashboard_until_ctrl_c(platform: Platform) -> None:
    workers = ("--worker", "big=6", "--worker", "small=2")
    running, started = up(platform, *workers, "--pool", "threads", PLATFORM_MEMORY="")
    assert [(w["name"], w["cpus"], w["slots"]) for w in started["workers"]] == [("big", 6, 6), ("small", 2, 2)]
    # They share the memory that one worker would have, in whole MiB.
    big, small = (worker["memory"] for worker in started["workers"])
    assert 0 <= big - 3 * small < 3 * 2**20
    assert big % 2**20 == small % 2**20 == 0
    assert big + small <= psutil.virtual_memory().total
    assert started["embedded"] is False
    assert all(psutil.pid_exists(pid) for pid in pids(started))
    with urllib.request.urlopen(started["dashboard"]["url"], timeout=PATIENCE) as answer:
        assert json.load(answer)["resources"]["total_cpus"] == 8
    assert submit(platform, 4) == "big"

    running.signal(signal.SIGINT)
    assert running.wait() == 0
    assert not any(psutil.pid_exists(pid) for pid in pids(started))
    assert list(platform.redis.scan_iter("worker:*")) == []
    ends = [line for line in running.lines if "shutdown" in line or "Ended" in line]
    assert ends[-1].startswith("Ended")


@pytest.mark.long
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_second_ctrl_c_breaks_running_jobs_off(platform: Platform, submitter: Submitter, pool: str) -> None:
    running, started = up(platform, "--worker", "a=2", "--pool", pool)
    job = submitter.send(SLEEP, 600)
    until_state(platform, job, "running")
    running.signal(signal.SIGINT)
    running.wait_for("Ending the workers")
    time.sleep(0.5)  # two signals within 0.3 s count as one
    running.signal(signal.SIGINT)
    assert running.wait() == 0
    errors = [line for line in running.lines if "Traceback" in line or "Error" in line]
    # The second signal may interrupt billiard's pool while it joins its processes. Celery tells of that and goes on.
    assert not errors or (pool == "prefork" and "Error on stopping Pool: IndexError" in errors[0]), errors
    assert not any(psutil.pid_exists(pid) for pid in pids(started))
    assert platform.celery("reconcile").returncode == 0
    assert state(platform, job) in ("accepted", "waiting")


@pytest.mark.long
def test_a_child_that_dies_is_started_again(platform: Platform, submitter: Submitter) -> None:
    running, started = up(platform, "--worker", "a=1", "--worker", "b=1", "--pool", "threads")
    os.kill(started["workers"][0]["pid"], signal.SIGKILL)
    running.wait_for("a was ended by SIGKILL. It is started again in 1 s.")
    os.kill(started["dashboard"]["pid"], signal.SIGKILL)
    running.wait_for("dashboard was ended by SIGKILL. It is started again in 1 s.")
    assert submitter.value(submitter.send(SLEEP, 0.01))["worker"] == "b"
    running.wait_for("dashboard is ready again")
    running.wait_for("a is ready again")
    os.kill(started["beat"]["pid"], signal.SIGKILL)
    running.wait_for("beat was ended by SIGKILL. It is started again in 1 s.")
    running.signal(signal.SIGINT)
    assert running.wait() == 0


@pytest.mark.long
def test_a_worker_that_is_told_to_end_is_not_started_again(platform: Platform) -> None:
    running, started = up(platform, "--worker", "a=1", "--worker", "b=1", "--pool", "threads")
    os.kill(started["workers"][0]["pid"], signal.SIGTERM)
    running.wait_for("a ended with exit code 0. It was told to end, and is not started again.")
    os.kill(started["workers"][1]["pid"], signal.SIGTERM)
    assert running.wait() == Exit.FAILED
    running.wait_for("no worker is left")


@pytest.mark.long
def test_it_prints_what_runs_and_sigterm_waits_for_running_jobs(platform: Platform, submitter: Submitter) -> None:
    running = platform.start(
        "up", "up", "--worker", "a=2", "--pool", "threads", says="Ctrl-C ends", PLATFORM_DASHBOARD="127.0.0.1:0"
    )
    output = "\n".join(running.lines)
    for what in ("Redis", "Postgres", "2 CPUs", "beat", "http://127.0.0.1:", "celery -A platform cluster"):
        assert what in output
    job = submitter.send(SLEEP, 6)
    until_state(platform, job, "running")
    running.signal(signal.SIGTERM)
    line = running.wait_for("Waiting for 1 running job:")
    assert f"{SLEEP} {job[:8]} on a (" in line
    assert running.wait() == 0
    assert state(platform, job) == "succeeded"


@pytest.mark.long
def test_without_any_worker_it_ends_with_a_failure(platform: Platform) -> None:
    platform.worker("a", pool="threads")
    running = platform.start("up", "up", "--worker", "a=1", PLATFORM_DASHBOARD="127.0.0.1:0")
    assert running.wait() == 1
    running.wait_for("a live worker")
    running.wait_for("no worker became ready")
    assert not [line for line in running.lines if "Traceback" in line]


@pytest.mark.long
def test_a_second_up_on_the_same_servers_leaves_beat_to_the_first(platform: Platform) -> None:
    first, _ = up(platform, "--worker", "a=1", "--pool", "threads")
    second, started = up(platform, "--worker", "b=1", "--pool", "threads")
    assert started["beat"] is None
    assert [worker["name"] for worker in started["workers"]] == ["b"]
    second.wait_for("beat: another `up` of these servers runs it")
    first.signal(signal.SIGINT)
    assert first.wait() == 0
    _, started = up(platform, "--worker", "c=1", "--pool", "threads")
    assert started["beat"] is not None


@pytest.fixture
def embedded(platform: Platform, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Yield the environment of a user without servers, and end all servers that were started."""
    environment: dict[str, Any] = {"REDIS_URL": "", "DATABASE_URL": "", "PLATFORM_HOME": str(tmp_path / "own")}
    yield environment
    platform.stop()
    assert platform.celery("down", **environment).returncode == 0


@pytest.mark.long(40)
def test_embedded_servers_outlive_up_and_end_with_down(
    platform: Platform, embedded: dict[str, Any], tmp_path: Path
) -> None:
    home = tmp_path / "own"
    asked = platform.celery("jobs", **embedded)
    assert asked.returncode == Exit.UNAVAILABLE
    assert running_pair(home) is None, "a question started servers"
    alone = platform.celery("servers", "start", "--json", **embedded)
    assert_shape("servers start", json.loads(alone.stdout))
    assert "Started embedded servers" in alone.stderr
    assert "no jobs" in platform.celery("jobs", **embedded).stdout
    running, started = up(platform, "--worker", "a=2", "--pool", "threads", **embedded)
    assert started["embedded"] is True
    assert started["redis_url"] == json.loads(alone.stdout)["redis_url"]
    # Another user submits from another folder, without any URL.
    assert submit(platform, 1, **embedded) == "a"
    cluster = json.loads(platform.celery("cluster", "--json", **embedded).stdout)
    assert cluster["resources"]["total_cpus"] == 2

    running.signal(signal.SIGINT)
    assert running.wait() == 0
    pair = running_pair(home)
    assert pair is not None
    assert pair.redis_url == started["redis_url"]

    done = platform.celery("down", "--json", **embedded)
    assert done.returncode == 0
    assert len(json.loads(done.stdout)["ended"]) == 2
    assert running_pair(home) is None
    again = platform.celery("down", **embedded)
    assert again.returncode == 0
    assert "No embedded servers" in again.stdout
