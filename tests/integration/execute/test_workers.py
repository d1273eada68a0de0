"""A worker's incarnations: what one publishes and under which name, how it keeps its place, and how it gives it up."""

from __future__ import annotations

import os
import re
import signal
import socket
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

from celery_capacity.routing.inspect import overview
from celery_capacity.routing.ledger import keys
from celery_capacity.workers.membership.preflight import whole_machine
from celery_capacity.workers.process.exit_codes import Exit
from celery_capacity.workers.process.identity import platform_version
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import READY, Platform, Pool, Process
from tests.fixtures.stores.books import job_field
from tests.fixtures.waiting import until

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"


#: A lease that passes in a test, and is renewed often enough for a busy machine.
SHORT_LEASE: dict[str, Any] = {
    "PLATFORM_RENEW_INTERVAL": "0.2",
    "PLATFORM_WORKER_TTL": "4",
    "PLATFORM_LOST_AFTER": "5",
}
#: Intervals at which the worker's own timer renews so seldom that only a tick of beat can do it.
TICK_ONLY: dict[str, Any] = {
    "PLATFORM_HEARTBEAT_INTERVAL": "0.5",
    "PLATFORM_RENEW_INTERVAL": "500",
    "PLATFORM_WORKER_TTL": "600",
    "PLATFORM_LOST_AFTER": "700",
}


def views(platform: Platform) -> set[str]:
    """Return the keys that `redis-cli KEYS "worker:*"` prints."""
    view_keys: Any = platform.redis.keys("worker:*")
    return {key.decode() for key in view_keys}


def lease(platform: Platform, worker: str) -> int:
    """Return the end of a worker's lease, in ms, or 0 where there is none."""
    end: Any = platform.redis.hget(keys.book(worker), "lease")
    return int(end or 0)


def lives(platform: Platform, worker: str) -> list[str]:
    """Return the status of each incarnation of a worker in Postgres, oldest first."""
    with platform.engine.connect() as connection:
        query = text("SELECT status FROM workers WHERE name = :name ORDER BY started_at, seen_at")
        return list(connection.execute(query, {"name": worker}).scalars())


def total_cpus(platform: Platform) -> float:
    return float(overview.read(platform.redis, platform.engine).to_json()["resources"]["total_cpus"])


def hold(platform: Platform, submitter: Submitter, gate: str, **options: Any) -> str:
    """Return a job that runs now."""
    job = submitter.send(HOLD, gate, **options)
    assert tasks.started(platform.redis, gate)[0] == job
    return job


# -- what it publishes


def test_the_view_and_the_table_say_who_it_is_and_what_it_has(platform: Platform, submitter: Submitter) -> None:
    before = datetime.now(UTC)
    worker = platform.worker("node-1.lab", 2.5, "threads", slots=7, PLATFORM_RESOURCES="licence=3")
    view = submitter.view("node-1.lab")
    assert view.pop("heartbeat_at") >= view["started_at"]
    started = datetime.fromisoformat(view.pop("started_at"))
    assert before - timedelta(seconds=2) < started < datetime.now(UTC)
    incarnation = view.pop("incarnation")
    assert view == {
        "cpus": "2.5",
        "allocated_cpus": "0",
        "memory": str(8 * 2**30),
        "allocated_memory": "0",
        "slots": "7",
        "allocated_slots": "0",
        "status": "ready",
        "hostname": socket.gethostname(),
        "pid": str(worker.pid),
        "version": platform_version(),
        "queue": f"worker.node-1.lab.{incarnation}",
    }
    assert 0 < platform.redis.pttl(keys.view("node-1.lab")) <= platform.settings.worker_ttl * 1000
    assert views(platform) == {"worker:node-1.lab"}
    with platform.engine.connect() as connection:
        row = connection.execute(text("SELECT * FROM workers")).one()
    assert (row.name, row.incarnation, row.cpus, row.memory) == ("node-1.lab", incarnation, 2500, 8 * 2**30)
    assert row.capacity == {"cpus": 2.5, "memory": 8 * 2**30, "slots": 7, "licence": 3}
    assert (row.status, row.hostname, row.pid, row.left_at) == ("ready", socket.gethostname(), worker.pid, None)
    job = hold(platform, submitter, "gate", cpus=0.5, memory="1GiB")
    view = submitter.view("node-1.lab")
    assert (view["allocated_cpus"], view["allocated_memory"], view["allocated_slots"]) == ("0.5", str(2**30), "1")
    tasks.let_go(platform.redis, "gate")
    assert submitter.ended(job).worker == "node-1.lab"


def test_the_log_says_what_was_published_and_where_each_number_came_from(platform: Platform) -> None:
    configured = platform.worker("told", 3, "solo", PLATFORM_RESOURCES="licence=3", PLATFORM_GPUS="1")
    line = configured.wait_for("published")
    for words in ("told", "3 CPUs (PLATFORM_CPUS)", "8 GiB memory (PLATFORM_MEMORY)", "1 slot (pool)"):
        assert words in line
    assert "3 licence (PLATFORM_RESOURCES)" in line
    detected = platform.worker("found", 3, "solo", PLATFORM_CPUS="", PLATFORM_MEMORY="")
    line = detected.wait_for("published")
    assert re.search(
        r"[0-9.]+ CPUs? \((affinity|cgroup v[12]|psutil)\), [0-9.]+ \w+ memory \((cgroup v[12]|psutil)\)", line
    )
    # Both workers publish the machine's capacity. This one is not limited by a setting, and is warned.
    if unset := whole_machine(replace(platform.settings, cpus=None, memory=None)):
        warning = f"told is on this machine too, and each worker publishes all of its {' and '.join(unset.values())}"
        assert warning in detected.wait_for(f"set {' and '.join(unset)} for each")


def test_the_pool_is_as_large_as_the_cpus_that_are_published(platform: Platform, submitter: Submitter) -> None:
    sizes = {"three": (3, "3"), "half": (0.5, "1"), "more": (2.5, "3")}
    for name, (cpus, _) in sizes.items():
        platform.worker(name, cpus, "threads", ready=False)
    for process in platform.processes:
        process.wait_for(READY)
    assert {name: submitter.view(name)["slots"] for name in sizes} == {
        name: slots for name, (_, slots) in sizes.items()
    }


# -- names


@pytest.mark.parametrize(
    ("arguments", "environment", "name"),
    [
        (("-n", "typed@%h"), {"NODE_NAME": "said"}, "said"),
        (("-n", "typed@%h"), {}, "typed"),
        (("-n", "typed"), {}, "typed"),
        (("-n", "gpu-%n.x@%h"), {}, f"gpu-{socket.gethostname().split('.')[0]}.x"),
        ((), {}, socket.gethostname()),
        (("-n", "celery@%h"), {}, socket.gethostname()),
    ],
)
def test_a_worker_is_named_by_node_name_or_its_option_or_its_host(
    platform: Platform, submitter: Submitter, arguments: tuple[str, ...], environment: dict[str, Any], name: str
) -> None:
    settings = {"NODE_NAME": "", "PLATFORM_CPUS": "1", **environment}
    platform.start(name, "worker", "--pool", "threads", "--loglevel", "INFO", *arguments, says=READY, **settings)
    assert views(platform) == {f"worker:{name}"}
    job = submitter.send(HOLD, "gate")
    tasks.let_go(platform.redis, "gate")
    # The name begins Celery's own node name, which a task sees as its host name.
    assert submitter.value(job) == name
    assert submitter.ended(job).worker == name
    node = f"{name}@{socket.gethostname()}"
    assert submitter.app.control.ping(destination=[node], timeout=60, limit=1) == [{node: {"ok": "pong"}}]


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "inside a solo task"])
def test_a_second_worker_of_a_live_name_ends_and_says_why(platform: Platform, submitter: Submitter, busy: bool) -> None:
    first = platform.worker("a", 1, "solo")
    gates = [hold(platform, submitter, "gate")] if busy else []
    incarnation = submitter.view("a")["incarnation"]
    second = platform.worker("a", 1, "threads", ready=False)
    assert second.wait() == Exit.UNAVAILABLE
    line = second.wait_for("a live worker is named a already")
    assert f"pid {first.pid} on {socket.gethostname()}" in line
    assert "NODE_NAME" in line
    assert not any("Traceback" in line for line in second.lines)
    assert submitter.view("a")["incarnation"] == incarnation
    assert lives(platform, "a") == ["ready"]
    tasks.let_go(platform.redis, "gate")
    for job in gates:
        assert submitter.ended(job).state == "succeeded"
    assert submitter.value(submitter.send(ADD, 1, 1)) == 2


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "with a job"])
def test_name_of_a_stopped_worker_is_free_when_its_lease_ran_out(
    platform: Platform, submitter: Submitter, busy: bool
) -> None:
    stopped = platform.worker("a", 1, "threads")
    job = hold(platform, submitter, "gate") if busy else None
    os.killpg(stopped.pid, signal.SIGSTOP)
    ends = lease(platform, "a")
    # The worker seems to be on another machine. On its own machine it would be ended first.
    imports = f"{platform.environment['PLATFORM_IMPORTS']},tests.tasks.cloned"
    again = platform.worker("a", 1, "threads", ready=False, PLATFORM_IMPORTS=imports)
    again.wait_for("is registered and silent")
    again.wait_for(READY)
    assert lease(platform, "a") - platform.settings.worker_ttl * 1000 >= ends
    assert submitter.view("a")["pid"] == str(again.pid)
    until(lambda: lives(platform, "a") == ["lost", "ready"], lambda: f"one life is over: {lives(platform, 'a')}")
    if job is not None:
        assert tasks.started(platform.redis, "gate")[0] == job
    # The stopped worker wakes up, finds its name taken, and goes. All its later calls are refused.
    os.killpg(stopped.pid, signal.SIGCONT)
    tasks.let_go(platform.redis, "gate", 2)
    assert stopped.wait(60) == Exit.UNAVAILABLE
    stopped.wait_for("a live worker is named a already")
    if job is not None:
        row = submitter.ended(job)
        assert (row.state, row.attempt) == ("succeeded", 2)
        assert submitter.outcomes(job) == ["lost", "succeeded"]
    assert again.alive
    assert lives(platform, "a")[-1] == "ready"
    assert submitter.value(submitter.send(ADD, 1, 1)) == 2


# -- how it keeps its place


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_heartbeat_is_not_delayed_by_a_pool_that_is_full(
    platform: Platform, submitter: Submitter, pool: Pool
) -> None:
    worker = platform.worker("a", 2, pool, **SHORT_LEASE)
    jobs = [hold(platform, submitter, "gate", cpus=0.5) for _ in range(1 if pool == "solo" else 2)]
    first = lease(platform, "a")
    # A lease passes. At each look it has not ended.
    while (now := lease(platform, "a")) < first + 4000:
        assert views(platform) == {"worker:a"}
        assert until(lambda: lease(platform, "a") > now, "the lease is renewed")
    tasks.let_go(platform.redis, "gate", len(jobs))
    for job in jobs:
        assert submitter.ended(job).state == "succeeded"
        assert submitter.outcomes(job) == ["succeeded"]
    assert not any("registered again" in line for line in worker.lines)


def test_the_tick_of_beat_reaches_every_worker_and_makes_no_job(platform: Platform, submitter: Submitter) -> None:
    for name, pool in (("full", "threads"), ("inside", "solo"), ("idle", "prefork")):
        worker_pool: Any = pool
        platform.worker(name, 1, worker_pool, **TICK_ONLY)
        if name != "idle":
            hold(platform, submitter, name)
    names = ("full", "inside", "idle")
    before = {name: lease(platform, name) for name in names}
    platform.beat(**TICK_ONLY)
    for _ in range(2):
        for name in names:
            until(lambda: lease(platform, name) > before[name], f"{name} hears the tick")  # noqa: B023
            before[name] = lease(platform, name)
    assert submitter.jobs() == 2
    for name in ("full", "inside"):
        tasks.let_go(platform.redis, name)
    until(lambda: submitter.allocated_cpus() == "0", "all is given back")


# -- how it gives it up


def test_a_worker_that_ends_warmly_admits_no_more_and_lets_run_what_runs(
    platform: Platform, submitter: Submitter
) -> None:
    worker = platform.worker("a", 2, "prefork")
    job = hold(platform, submitter, "gate")
    queue = submitter.view("a")["queue"]
    worker.signal(signal.SIGTERM)
    until(lambda: submitter.view("a")["status"] == "draining", "it drains")
    until(lambda: lives(platform, "a") == ["draining"], "Postgres knows it too")
    later = submitter.send(ADD, 1, 2)
    renewed = lease(platform, "a")
    until(lambda: lease(platform, "a") > renewed, "its lease is renewed while it waits for its job")
    assert submitter.view("a")["status"] == "draining"
    assert submitter.row(later).attempt == 0
    assert worker.alive
    tasks.let_go(platform.redis, "gate")
    assert worker.wait() == 0
    assert submitter.ended(job).state == "succeeded"
    assert submitter.outcomes(job) == ["succeeded"]
    assert views(platform) == set()
    assert lives(platform, "a") == ["left"]
    assert platform.redis.exists(keys.book("a"), keys.held("a"), queue) == 0
    assert not any("Traceback" in line for line in worker.lines), worker.tail()
    platform.worker("b", 1, "solo")
    assert submitter.value(later) == 3
    assert submitter.ended(later).worker == "b"


def test_what_was_admitted_and_not_started_is_handed_back(platform: Platform, submitter: Submitter) -> None:
    worker = platform.worker("a", 8, "threads")
    other = platform.worker("b", 1, "threads")
    # The worker takes in nothing while it is stopped. So no admitted job has started when the worker is told to end.
    os.killpg(worker.pid, signal.SIGSTOP)
    jobs = [submitter.send(ADD, number, 1, cpus=2) for number in range(4)]
    assert {job_field(platform.redis, job, "worker") for job in jobs} == {b"a"}
    worker.signal(signal.SIGTERM)
    os.killpg(worker.pid, signal.SIGCONT)
    assert worker.wait() == 0
    other.stop()
    platform.worker("c", 8, "threads")
    assert [submitter.value(job) for job in jobs] == [1, 2, 3, 4]
    for job in jobs:
        row = submitter.ended(job)
        assert (row.state, row.losses) == ("succeeded", 0)
        # Each job ran once: there, if it had begun when the worker was told to end, else where there was room.
        assert submitter.outcomes(job) in (["succeeded"], ["handed_back", "succeeded"])


@pytest.mark.parametrize("warm_first", [False, True])
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_cold_end_hands_back_what_it_breaks_off(
    platform: Platform, submitter: Submitter, pool: Pool, warm_first: bool
) -> None:
    pidfile = platform.folder / "a.pid"
    worker = platform.worker("a", 2, pool, arguments=("--pidfile", str(pidfile)))
    job = hold(platform, submitter, "gate", cpus=2)
    if warm_first:
        worker.signal(signal.SIGTERM)
        worker.wait_for("Warm shutdown")
    worker.signal(signal.SIGQUIT)
    assert worker.wait() == 0
    assert not pidfile.exists()
    assert not [line for line in worker.lines if "Traceback" in line]
    row = until(lambda: (latest := submitter.row(job)).state == "waiting" and latest, "the job waits again")
    assert (row.attempt, row.losses) == (1, 0)
    assert submitter.outcomes(job) == ["handed_back"]
    assert lives(platform, "a") == ["left"]
    platform.worker("b", 2, "threads")
    assert tasks.started(platform.redis, "gate")[0] == job
    tasks.let_go(platform.redis, "gate")
    assert submitter.value(job) == "b"
    assert submitter.ended(job).attempt == 2


def test_worker_warns_when_memory_is_published_twice(platform: Platform) -> None:
    platform.worker("a", 2, "threads", PLATFORM_MEMORY="")
    second = platform.worker("b", 2, "threads", PLATFORM_MEMORY="")
    if "PLATFORM_MEMORY" in whole_machine(replace(platform.settings, memory=None)):  # no limit of a container
        warning = second.wait_for("set PLATFORM_MEMORY for each")
        assert "a is on this machine too, and each worker publishes all of its memory" in warning
    third = platform.worker("c", 2, "threads")
    assert not [line for line in third.lines if "on this machine too" in line]


def test_capacity_comes_and_goes_with_workers_without_any_list_of_them(platform: Platform) -> None:
    first = platform.worker("a", 2, "threads", **SHORT_LEASE)
    assert total_cpus(platform) == 2
    second = platform.worker("b", 4.5, "threads", **SHORT_LEASE)
    third = platform.worker("c", 1, "threads", **SHORT_LEASE)
    assert total_cpus(platform) == 7.5
    assert views(platform) == {"worker:a", "worker:b", "worker:c"}
    assert first.stop() == 0
    assert total_cpus(platform) == 5.5
    ends = lease(platform, "b")
    second.kill()
    until(lambda: total_cpus(platform) == 1, "the killed one is no longer counted")
    assert lease(platform, "c") >= ends
    assert views(platform) == {"worker:c"}
    until(lambda: lives(platform, "b") == ["lost"], "Postgres remembers it")
    assert (lives(platform, "a"), lives(platform, "c")) == (["left"], ["ready"])
    until(lambda: not platform.redis.exists(keys.book("a"), keys.book("b")), "their books are gone")
    assert third.alive


def test_without_tables_a_worker_says_what_to_run(platform: Platform) -> None:
    with platform.engine.begin() as connection:
        connection.execute(text("ALTER TABLE jobs RENAME TO elsewhere"))
        connection.execute(text("DROP TABLE alembic_version"))
    try:
        worker: Process = platform.worker("a", 1, "solo", ready=False)
        assert worker.wait() not in (0, 1)
        worker.wait_for("celery -A platform db upgrade")
    finally:
        with platform.engine.begin() as connection:
            connection.execute(text("ALTER TABLE elsewhere RENAME TO jobs"))
