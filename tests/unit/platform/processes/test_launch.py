"""`--worker NAME=CPUS`, and the invented machine of a rehearsal."""

from __future__ import annotations

import click
import pytest

from celery_capacity.platform.processes.launch import WorkerSpec, parse_workers
from celery_capacity.platform.processes.local_cluster import Running
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.inspect.overview import WorkerLine


@pytest.mark.parametrize(
    ("text", "cpus", "slots"), [("worker-01=72", 72_000, 72), ("a=0.5", 500, 40), ("a=40.001", 40_001, 41)]
)
def test_a_worker_is_a_name_and_its_cpus(text: str, cpus: int, slots: int) -> None:
    spec = WorkerSpec.parse(text)
    assert (spec.name, spec.cpus, spec.slots) == (text.partition("=")[0], cpus, slots)


@pytest.mark.parametrize("text", ["a", "=4", "a b=4", "a:b=4", "a=", "a=0", "a=-1", "a=many", "a=4=5", "a=nan"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        WorkerSpec.parse(text)


def test_two_workers_of_one_name_are_refused() -> None:
    command = click.Command("up", params=[click.Option(["--worker"], multiple=True)])
    context = click.Context(command)
    with pytest.raises(click.BadParameter, match="twice"):
        parse_workers(context, command.params[0], ("a=1", "a=2"))
    assert parse_workers(context, command.params[0], ("a=1", "b=2"))[1].name == "b"


def test_up_shows_a_workers_whole_capacity_and_the_pid_second() -> None:
    capacity = {"cpus": 1000, "memory": 2**30, "slots": 1, "gpus": 2, "licence": 1, "queue:": 1, "queue:big": 10**9}
    worker = WorkerLine("w", "ready", capacity, {}, None, None, 7, "life", None, None)
    postgres = "postgresql://postgres@/platform?host=%2Fhome%2Fme%2Frun"
    running = Running("redis://127.0.0.1:1/0", postgres, True, (worker,), None, 8, "http://127.0.0.1:8000")
    assert running.rows() == [
        ("Redis", "", "redis://127.0.0.1:1/0 (embedded)"),
        ("Postgres", "", "postgresql://postgres@/platform?host=/home/me/run (embedded)"),
        ("w", "7", "1 CPU, 1 GiB, 1 slot, 2 gpus, 1 licence"),
        ("beat", "", "does not run here"),
        ("dashboard", "8", "http://127.0.0.1:8000"),
    ]
