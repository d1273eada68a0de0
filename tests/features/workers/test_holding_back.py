"""Operators cordon and drain workers, and pause parts of the backlog: with real workers and the commands."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from celery_capacity.routing.ledger import keys
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"


def command(platform: Platform, *words: str) -> Any:
    """Run a command with --json, and return what it printed."""
    done = platform.celery(*words, "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


def why(platform: Platform, job: str) -> str:
    return str(command(platform, "job", job)["why"]["why"])


def test_worker_killed_while_cordoned_comes_back_cordoned(platform: Platform, submitter: Submitter) -> None:
    worker = platform.worker("a", cpus=2)
    running = submitter.send(HOLD, "gate")
    tasks.started(platform.redis, "gate")
    (order,) = command(platform, "cordon", "a", "--reason", "fan is loud", "--by", "ann")
    assert (order["status"], order["running"], order["applied"]) == ("cordoned", 1, True)
    job = submitter.send(ADD, 1, 2)
    submitter.until(job, "waiting")
    assert why(platform, job) == "cordoned"
    shown = platform.celery("cluster").stdout
    assert "cordoned: a since" in shown and "by ann (fan is loud)" in shown
    tasks.let_go(platform.redis, "gate")
    assert submitter.ended(running).state == "succeeded"
    worker.kill()
    assert [cordon["worker"] for cordon in command(platform, "cluster")["cordons"]] == ["a"]
    platform.worker("a", cpus=2)
    assert submitter.row(job).state == "waiting"
    assert command(platform, "cluster")["workers"][0]["status"] == "cordoned"
    assert command(platform, "uncordon", "a")[0]["before"]
    assert submitter.ended(job).state == "succeeded"


def test_drain_hands_back_at_its_deadline_what_still_runs(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", cpus=1)
    job = submitter.send(HOLD, "gate")
    _, pid = tasks.started(platform.redis, "gate")
    platform.worker("b", cpus=1)
    (order,) = command(platform, "drain", "a", "--deadline", "0.1s", "--wait", "--reason", "new disk")
    assert (order["status"], order["running"], order["cordon"]["reason"]) == ("draining", 0, "new disk")
    # It starts anew on the other worker. The attempt is no loss, and the first process is gone.
    again, other = tasks.started(platform.redis, "gate")
    assert (again, other != pid) == (job, True)
    tasks.let_go(platform.redis, "gate")
    row = submitter.ended(job)
    assert (row.state, row.worker, row.attempt, row.losses) == ("succeeded", "b", 2, 0)
    assert submitter.outcomes(job) == ["handed_back", "succeeded"]
    # The worker stays, and takes jobs again once it may.
    platform.processes[1].stop()
    next_job = submitter.send(ADD, 1, 2)
    submitter.until(next_job, "waiting")
    command(platform, "uncordon", "a")
    assert (submitter.ended(next_job).worker, submitter.row(next_job).attempt) == ("a", 1)


def test_drain_waits_for_running_jobs_and_stops_the_worker(platform: Platform, submitter: Submitter) -> None:
    worker = platform.worker("a", cpus=1)
    job = submitter.send(HOLD, "gate")
    tasks.started(platform.redis, "gate")
    assert command(platform, "drain", "a", "--stop")[0]["running"] == 1
    assert worker.alive
    tasks.let_go(platform.redis, "gate")
    assert submitter.ended(job).state == "succeeded"
    assert worker.wait() == 0
    # A supervisor starts it again: it stays, and is cordoned.
    platform.worker("a", cpus=1)
    later = submitter.send(ADD, 1, 2)
    submitter.until(later, "waiting")
    assert platform.processes[-1].alive
    assert not command(platform, "cluster")["workers"][0]["cordon"]["stops"]
    command(platform, "uncordon", "a")
    assert submitter.ended(later).state == "succeeded"


def test_drain_with_stop_ends_jobs_of_threads_at_its_deadline(platform: Platform, submitter: Submitter) -> None:
    worker = platform.worker("a", cpus=1, pool="threads")
    job = submitter.send(HOLD, "gate")
    tasks.started(platform.redis, "gate")
    command(platform, "drain", "a", "--stop", "--deadline", "0.1s")
    assert worker.wait() == 0
    submitter.until(job, "waiting")
    assert (submitter.row(job).losses, submitter.outcomes(job)) == (0, ["handed_back"])
    platform.worker("b", cpus=1)
    tasks.started(platform.redis, "gate")
    tasks.let_go(platform.redis, "gate", 2)
    assert submitter.ended(job).worker == "b"


def test_paused_queue_stays_paused_though_redis_is_emptied(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", cpus=2, arguments=("-Q", "celery,render"))
    order = command(platform, "pause", "--queue", "render", "--reason", "licence", "--by", "ann")
    assert (order["paused"], order["before"], order["applied"]) == (True, False, True)
    jobs = [submitter.send(ADD, 1, number, queue="render") for number in range(3)]
    for job in jobs:
        submitter.until(job, "waiting")
    assert submitter.ended(submitter.send(ADD, 1, 2)).state == "succeeded"
    assert why(platform, jobs[0]) == "paused"
    assert "paused: queue render since" in platform.celery("cluster").stdout
    assert "resume --queue render" in platform.celery("job", jobs[0]).stdout
    epoch = platform.redis.hget(keys.EPOCH, "epoch")
    platform.redis.flushdb()
    until(lambda: platform.redis.hget(keys.EPOCH, "epoch") not in (None, epoch), "the ledger is opened anew")
    assert submitter.ended(submitter.send(ADD, 1, 2)).state == "succeeded"
    assert {submitter.row(job).state for job in jobs} == {"waiting"}
    assert command(platform, "resume", "--queue", "render")["before"]
    assert {submitter.ended(job).state for job in jobs} == {"succeeded"}


@pytest.mark.parametrize("what", [("--task", ADD), ()], ids=["task", "platform"])
def test_running_jobs_go_on_while_others_are_paused(
    platform: Platform, submitter: Submitter, what: tuple[str, ...]
) -> None:
    platform.worker("a", cpus=1)
    running = submitter.send(HOLD, "gate")
    tasks.started(platform.redis, "gate")
    command(platform, "pause", *what)
    job = submitter.send(ADD, 1, 2)
    submitter.until(job, "waiting")
    tasks.let_go(platform.redis, "gate")
    assert submitter.ended(running).state == "succeeded"
    assert submitter.row(job).state == "waiting"
    command(platform, "resume", *what)
    assert submitter.ended(job).state == "succeeded"


def test_mistyped_names_are_answered_with_the_nearest(platform: Platform) -> None:
    worker = platform.worker("render-01", cpus=1)
    for name in ("cordon", "uncordon", "drain"):
        done = platform.celery(name, "rendr-01")
        assert (done.returncode, "The nearest: render-01" in done.stderr) == (1, True)
    done = platform.celery("resume", "--queue", "mail")
    assert (done.returncode, done.stdout.strip()) == (1, "was not paused: queue mail")
    done = platform.celery("pause", "--queue", "a", "--task", "b")
    assert (done.returncode, "cannot be named together" in done.stderr) == (1, True)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0


def test_priority_moves_a_waiting_job_before_the_others(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", cpus=1)
    running = submitter.send(HOLD, "gate")
    tasks.started(platform.redis, "gate")
    jobs = [submitter.send(HOLD, "gate") for _ in range(3)]
    for job in jobs:
        submitter.until(job, "waiting")
    results = command(platform, "priority", running, jobs[2], "8", "--reason", "customer", "--by", "ann")
    assert [(result["became"], result["before"]) for result in results] == [("next-attempt", 0), ("moved", 0)]
    for expected in (jobs[2], jobs[0], jobs[1]):
        tasks.let_go(platform.redis, "gate")
        assert tasks.started(platform.redis, "gate")[0] == expected
    tasks.let_go(platform.redis, "gate")
    assert [submitter.ended(job).priority for job in (running, *jobs)] == [8, 0, 0, 8]
    done = platform.celery("priority", running, "9")
    assert (done.returncode, "celery -A platform retry" in done.stdout) == (1, True)
    done = platform.celery("priority", jobs[0], "10")
    assert done.returncode == 2
