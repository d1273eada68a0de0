"""The metrics of a worker over HTTP: what it serves, a port that is taken, and a child that does not keep the port."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from celery_capacity.routing.model.states import Outcome, Store
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.supervision.job_times import JobTimes
from celery_capacity.workers.supervision.metric_names import METRICS, Server, series_of
from celery_capacity.workers.supervision.metrics_server import WorkerMetrics

LOOPBACK = "127.0.0.1"


def metrics_of(worker: str, reached_at: float = 0.0) -> WorkerMetrics:
    resources = {"cpus": 4000, "memory": 2**30, "queue:mail": 1}, {"cpus": 1500}
    times = JobTimes(lambda job, token: None)
    times.began("job:1.1", ("tasks.render", "job", {}))
    times.over("job", Token(1, 1), Outcome.SUCCEEDED)
    return WorkerMetrics(worker, lambda: resources, lambda: reached_at, lambda: (Store.LEDGER, 7), times)


@pytest.fixture
def metrics() -> Iterator[WorkerMetrics]:
    metrics = metrics_of("a", time.monotonic())
    yield metrics
    metrics.stop()


def scraped(port: int | None) -> dict[tuple[str, ...], float]:
    with urlopen(f"http://{LOOPBACK}:{port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def test_worker_serves_what_it_knows_itself(metrics: WorkerMetrics) -> None:
    served = scraped(metrics.start((LOOPBACK, 0)))
    of_workers = {series for metric in METRICS if Server.WORKER in metric.served_by for series in series_of(metric)}
    assert {name for name, *_ in served} == of_workers
    served = {key: value for key, value in served.items() if not key[0].startswith("platform_worker_")}
    age = served.pop(("platform_heartbeat_age_seconds", "a"))
    assert age >= 0
    assert served == {
        ("platform_resource_capacity", "cpus", "a"): 4,
        ("platform_resource_capacity", "memory", "a"): 2**30,
        ("platform_resource_allocated", "cpus", "a"): 1.5,
        ("platform_resource_allocated", "memory", "a"): 0,
        ("platform_authority", "ledger"): 1,
        ("platform_authority", "postgres"): 0,
        ("platform_epoch",): 7,
    }


def test_age_is_left_out_before_the_first_heartbeat() -> None:
    ages = [family for family in metrics_of("a").collect() if family.name == "platform_heartbeat_age_seconds"]
    assert [family.samples for family in ages] == [[]]


def test_worker_goes_on_where_its_address_is_taken(metrics: WorkerMetrics, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server((LOOPBACK, 0)) as other:
        port = other.getsockname()[1]
        with caplog.at_level(logging.WARNING):
            assert metrics.start((LOOPBACK, port)) is None
        metrics.stop()
    assert f"PLATFORM_WORKER_METRICS={LOOPBACK}:{port}" in caplog.text
    assert "a port of its own" in caplog.text


def test_port_is_free_after_the_stop_beside_a_child_that_lives(metrics: WorkerMetrics) -> None:
    port = metrics.start((LOOPBACK, 0))
    assert port is not None
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    try:
        metrics.stop()
        with socket.socket() as again:
            again.bind((LOOPBACK, port))
            again.listen()
    finally:
        os.close(writing)
        os.close(reading)
        os.waitpid(child, 0)
