"""`--worker NAME=CPUS`, and the invented machine of a rehearsal."""

from __future__ import annotations

from dataclasses import replace

import click
import pytest

from celery_capacity.platform.processes.launch import WorkerSpec, parse_workers
from celery_capacity.platform.processes.running import Running
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.inspect.worker_lines import WorkerLine


@pytest.mark.parametrize(
    ("text", "cpus", "slots"), [("worker-01=72", 72_000, 72), ("a=0.5", 500, 40), ("a=40.001", 40_001, 41)]
)
def test_a_worker_is_a_name_and_its_cpus(text: str, cpus: int, slots: int) -> None:
    spec = WorkerSpec.parse(text)
    assert (spec.name, spec.cpus, spec.slots) == (text.partition("=")[0], cpus, slots)


def test_a_worker_may_say_all_that_it_has() -> None:
    spec = WorkerSpec.parse("gpu=CPUS:8,memory:32GiB,gpus:1,licence:2,slots:3,scratch:200")
    assert (spec.cpus, spec.memory, spec.gpus, spec.concurrency) == (8_000, 32 * 2**30, 1, 3)
    assert spec.environ() == {
        "NODE_NAME": "gpu",
        "PLATFORM_CPUS": "8",
        "PLATFORM_MEMORY": str(32 * 2**30),
        "PLATFORM_GPUS": "1",
        "PLATFORM_RESOURCES": "licence=2,scratch=200",
    }
    assert WorkerSpec.parse("a=2,memory:1GiB") == WorkerSpec("a", 2_000, memory=2**30)
    assert WorkerSpec("a", 2_000).environ() == {"NODE_NAME": "a", "PLATFORM_CPUS": "2"}


@pytest.mark.parametrize(
    ("amounts", "why"),
    [
        ("memory:1GiB", "says no CPUs"),
        ("cpus:2,cpus:3", "has cpus twice"),
        ("2,memory:lots", "'lots'"),
        ("2,gpus:half", "'half'"),
        ("2,licence:1,licence:2", "has licence twice"),
        ("2,:1", "resource name"),
        ("2,", "''"),
        ("2,slots:0", "has no slots"),
        ("2,queues:1", "queues"),
    ],
)
def test_a_wrong_amount_is_refused_with_the_worker_and_the_value(amounts: str, why: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        WorkerSpec.parse(f"a={amounts}")
    assert "--worker a" in str(caught.value)
    assert why in str(caught.value)


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
    pair = Pair("redis://127.0.0.1:1/0", postgres, 5, 6, data="/home/me")
    running = Running("redis://127.0.0.1:1/0", postgres, pair, (worker,), None, 8, "http://127.0.0.1:8000")
    assert running.rows() == [
        ("Redis", "5", "redis://127.0.0.1:1/0 (embedded)"),
        ("Postgres", "6", "embedded, in /home/me"),
        ("w", "7", "1 CPU, 1 GiB, 1 slot, 2 gpus, 1 licence"),
        ("beat", "", "does not run here"),
        ("JSON API", "8", "http://127.0.0.1:8000"),
    ]
    with_urls = replace(running, embedded=None)
    assert with_urls.rows()[1] == ("Postgres", "", "postgresql://postgres@/platform?host=/home/me/run")
