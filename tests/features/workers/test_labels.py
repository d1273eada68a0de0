"""Jobs run where `where`, `worker`, `exclusive` and `placement` say, and a job that no worker may run says why."""

from __future__ import annotations

import json

from sqlalchemy import text

from celery_capacity.routing.inspect.explain import explain
from celery_capacity.routing.model.reasons import Reason
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"


def test_jobs_run_on_the_workers_that_they_ask_for(platform: Platform, submitter: Submitter) -> None:
    platform.worker("x", cpus=2, pool="threads", PLATFORM_LABELS="arch=x86_64,disk=ssd,mem=64")
    platform.worker("y", cpus=2, pool="threads", PLATFORM_LABELS="arch=aarch64,mem=16")
    arm = [submitter.send(ADD, 1, 2, where={"arch": "aarch64"}) for _ in range(3)]
    large = submitter.send(ADD, 1, 2, where={"mem": ">=32", "disk": "in nvme,ssd"})
    named = submitter.send(ADD, 1, 2, worker="y")
    command = platform.celery("submit", ADD, "--args", "[1, 2]", "--where", "disk!=ssd", "--json")
    assert {submitter.ended(job).worker for job in (*arm, named, json.loads(command.stdout)["id"])} == {"y"}
    assert submitter.ended(large).worker == "x"
    workers = {
        line["name"]: line["labels"] for line in json.loads(platform.celery("cluster", "--json").stdout)["workers"]
    }
    assert workers["y"] == {"arch": "aarch64", "mem": "16"}
    assert "arch=x86_64, disk=ssd, mem=64" in platform.celery("cluster").stdout
    with platform.engine.connect() as connection:
        rows = {row.name: row.labels for row in connection.execute(text("SELECT name, labels FROM workers"))}
    assert rows == workers


def test_job_without_a_worker_of_its_labels_says_what_workers_have(platform: Platform, submitter: Submitter) -> None:
    platform.worker("x", cpus=2, pool="threads", PLATFORM_LABELS="arch=x86_64")
    job = submitter.send(ADD, 1, 2, where={"arch": "aarch64"})
    with platform.engine.connect() as connection:
        explanation = explain(platform.redis, connection, job)
    assert explanation is not None
    assert (explanation.why, explanation.where, explanation.labels) == (Reason.NO_LABEL, "arch=aarch64", "arch=x86_64")
    assert "No worker is as it asks: arch=aarch64. The workers have arch=x86_64." in platform.celery("job", job).stdout
    (line,) = json.loads(platform.celery("cluster", "--json").stdout)["backlog"]
    assert (line["where"], line["blocked"]) == ("arch=aarch64", "no-label")
    platform.worker("y", cpus=2, pool="threads", PLATFORM_LABELS="arch=aarch64")
    assert submitter.ended(job).worker == "y"


def test_exclusive_job_has_its_worker_alone(platform: Platform, submitter: Submitter) -> None:
    platform.worker("x", cpus=4, pool="threads")
    first = submitter.send(HOLD, "first", cpus=1)
    tasks.started(platform.redis, "first")
    alone = submitter.send(HOLD, "alone", cpus=1, exclusive=True)
    with platform.engine.connect() as connection:
        explanation = explain(platform.redis, connection, alone)
    assert explanation is not None
    assert (explanation.why, explanation.exclusive) == (Reason.ALONE, True)
    assert "It asks to run alone on a worker" in platform.celery("job", alone).stdout
    tasks.let_go(platform.redis, "first")
    tasks.started(platform.redis, "alone")
    last = submitter.send(ADD, 1, 2, cpus=1)
    submitter.until(last, "waiting")
    tasks.let_go(platform.redis, "alone")
    assert [submitter.ended(job).state for job in (first, alone, last)] == ["succeeded"] * 3


def test_spread_jobs_fill_the_emptiest_worker(platform: Platform, submitter: Submitter) -> None:
    platform.worker("x", cpus=4, pool="threads")
    platform.worker("y", cpus=4, pool="threads")
    packed = [submitter.send(HOLD, "packed", cpus=1) for _ in range(2)]
    for _ in packed:
        tasks.started(platform.redis, "packed")
    spread = [submitter.send(HOLD, "spread", cpus=1, placement="spread") for _ in range(2)]
    for _ in spread:
        tasks.started(platform.redis, "spread")
    for gate in ("packed", "spread"):
        tasks.let_go(platform.redis, gate, 2)
    (packed_on,) = {submitter.ended(job).worker for job in packed}
    (spread_on,) = {submitter.ended(job).worker for job in spread}
    assert packed_on != spread_on
