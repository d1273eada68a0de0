"""Inspecting workers and controlling them (Celery: Workers Guide, "Inspecting workers" and "Commands")."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery.exceptions import TimeLimitExceeded

from celery_capacity.routing.config.embedded import Pair
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"
#: Seconds for the answers of all asked workers.
ANSWER_WITHIN = 60.0


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("inspect"), "tests.tasks.restarts") as running:
        running.worker("a", cpus=4, slots=4)
        running.worker("t", cpus=1, pool="threads")
        yield running


def asked(submitter: Submitter, what: str, *names: str, ids: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the answers by worker: `names` are the asked workers, `ids` the jobs in question."""
    nodes = [node for node in nodes_of(submitter) if node.partition("@")[0] in names]
    inspect = submitter.app.control.inspect(nodes, timeout=ANSWER_WITHIN, limit=len(nodes))
    answers = getattr(inspect, what)(*ids) or {}
    return {node.partition("@")[0]: answer for node, answer in answers.items()}


def nodes_of(submitter: Submitter) -> list[str]:
    """Return Celery's names of the live workers."""
    with submitter.platform.engine.connect() as connection:
        node_names = connection.exec_driver_sql("SELECT name || '@' || hostname FROM workers WHERE status = 'ready'")
        return list(node_names.scalars())


def control(submitter: Submitter, worker: str, command: str, **arguments: Any) -> Any:
    nodes = [node for node in nodes_of(submitter) if node.partition("@")[0] == worker]
    (answer,) = submitter.app.control.broadcast(
        command, arguments, destination=nodes, reply=True, timeout=ANSWER_WITHIN, limit=1
    )
    return answer[nodes[0]]


def test_what_runs_is_shown_with_its_request_and_allocation(platform: Platform, submitter: Submitter) -> None:
    job = submitter.send(HOLD, "seen", cpus=2, memory="1GiB")
    tasks.started(platform.redis, "seen")
    later = submitter.send(ADD, 1, 1, countdown=60)
    row = submitter.until(job, "running")
    expected = {
        "request": {"cpus": 2, "memory": 2**30, "slots": 1},
        "allocation": {"worker": "a", "attempt": 1, "token": f"{row.epoch}.1"},
    }

    until(lambda: asked(submitter, "active", "a")["a"], "it is active")
    answers = asked(submitter, "active", "a", "t")
    assert answers["t"] == []
    (entry,) = answers["a"]
    assert {"id": job, "name": HOLD, "args": "('seen',)", **expected}.items() <= entry.items()
    queried = asked(submitter, "query_task", "a", "t", ids=(job,))
    assert queried["t"] == {}
    state, shown = queried["a"][job]
    assert (state, shown["allocation"], shown["request"]) == ("active", expected["allocation"], expected["request"])
    # A worker holds no job that is to start later, since Postgres keeps it.
    for what in ("reserved", "scheduled"):
        assert asked(submitter, what, "a", "t") == {"a": [], "t": []}
    scheduled = platform.celery("jobs", "--state", "scheduled", "--json")
    assert [row["id"] for row in json.loads(scheduled.stdout)] == [later]

    stats = asked(submitter, "stats", "a", "t")
    assert stats["a"]["capacity"] == {"cpus": 4, "memory": 8 * 2**30, "slots": 4}
    assert stats["a"]["allocated"] == {"cpus": 2, "memory": 2**30, "slots": 1}
    assert stats["t"]["allocated"]["cpus"] == 0
    assert stats["a"]["pool"]["max-concurrency"] == 4

    submitter.app.control.revoke(later)
    until(lambda: asked(submitter, "revoked", "a")["a"] == [later], "the worker knows what was revoked")
    assert ADD in asked(submitter, "registered", "a")["a"]
    assert asked(submitter, "conf", "a")["a"]["worker_consumer"] == "celery_capacity.workers.execute.consumer:Consumer"
    assert "celery" in asked(submitter, "report", "a")["a"]["ok"]
    printed = platform.celery("inspect", "active", "--json", "--timeout", "5")
    assert printed.returncode == 0, printed.stderr
    shown = {node.partition("@")[0]: entries for node, entries in json.loads(printed.stdout).items()}
    assert shown["a"][0]["allocation"] == expected["allocation"]
    tasks.let_go(platform.redis, "seen")
    assert submitter.value(job) == "a"


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """Stop these processes within the block."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_what_was_admitted_and_has_not_begun_is_reserved(platform: Platform, submitter: Submitter) -> None:
    """A worker holds no job that it cannot begin at once: only a pool that does not answer shows a reserved job."""
    for _ in range(5):
        submitter.send(HOLD, "all")
    holders = dict(tasks.started(platform.redis, "all") for _ in range(5))
    tasks.let_go(platform.redis, "all", len(holders))
    pool = [pid for job, pid in holders.items() if submitter.value(job) == "a"]
    assert len(pool) == 4
    with stopped(pool):
        job = submitter.send(ADD, 1, 2, cpus=2, memory="1GiB")
        (entry,) = until(lambda: asked(submitter, "reserved", "a")["a"], "it is reserved")
        row = submitter.until(job, "running")
        facts = {
            "id": job,
            "request": {"cpus": 2, "memory": 2**30, "slots": 1},
            "allocation": {"worker": "a", "attempt": 1, "token": f"{row.epoch}.1"},
        }
        assert facts.items() <= entry.items()
        assert asked(submitter, "active", "a") == {"a": []}
        state, shown = asked(submitter, "query_task", "a", ids=(job,))["a"][job]
        assert state == "reserved"
        assert facts.items() <= shown.items()
        assert asked(submitter, "stats", "a")["a"]["allocated"]["cpus"] == 2
    assert submitter.value(job) == 3
    assert asked(submitter, "reserved", "a") == {"a": []}
    assert submitter.outcomes(submitter.ended(job).id) == ["succeeded"]


def test_a_time_limit_given_to_the_workers_holds(platform: Platform, submitter: Submitter) -> None:
    assert control(submitter, "a", "time_limit", task_name=HOLD, hard=1) == {"ok": "time limits set successfully"}
    job = submitter.send(HOLD, "limited", cpus=3)
    with pytest.raises(TimeLimitExceeded):
        submitter.value(job)
    assert submitter.ended(job).state == "failed"
    assert control(submitter, "a", "time_limit", task_name=HOLD) == {"ok": "time limits set successfully"}


def test_the_pool_is_restarted_where_it_can_be(platform: Platform, submitter: Submitter) -> None:
    """A running job goes on to its end, in its old process; later jobs run in new ones."""
    running = submitter.send(HOLD, "restart", cpus=2)
    _, before = tasks.started(platform.redis, "restart")
    assert control(submitter, "a", "pool_restart") == {"ok": "reload started"}
    tasks.let_go(platform.redis, "restart")
    assert submitter.value(running) == "a"
    assert (submitter.ended(running).state, submitter.outcomes(running)) == ("succeeded", ["succeeded"])
    pids = set()
    for _ in range(4):
        job = submitter.send(HOLD, "restart", cpus=2)
        pids.add(tasks.started(platform.redis, "restart")[1])
        tasks.let_go(platform.redis, "restart")
        assert submitter.value(job) == "a"
    assert before not in pids
    assert "cannot be restarted" in control(submitter, "t", "pool_restart")["error"]
    assert submitter.value(submitter.send(ADD, 1, 1)) == 2


def test_a_remote_shutdown_drains(platform: Platform, submitter: Submitter) -> None:
    """Running jobs end, waiting jobs go to other workers, and no new job comes to this one."""
    leaving = platform.worker("leaving", cpus=8)
    job = submitter.send(HOLD, "leaving", cpus=8)
    tasks.started(platform.redis, "leaving")
    waiting = submitter.send(ADD, 1, 1, cpus=8)
    nodes = [node for node in nodes_of(submitter) if node.startswith("leaving@")]
    submitter.app.control.shutdown(destination=nodes)
    until(lambda: status_of(submitter, "leaving") == "draining", "it drains")
    tasks.let_go(platform.redis, "leaving")
    assert leaving.wait() == 0
    assert (submitter.ended(job).state, submitter.outcomes(job)) == ("succeeded", ["succeeded"])
    assert submitter.row(waiting).state in ("accepted", "waiting")
    submitter.app.control.revoke(waiting)


def status_of(submitter: Submitter, worker: str) -> str | None:
    return submitter.view(worker).get("status")
