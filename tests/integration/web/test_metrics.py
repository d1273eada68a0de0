"""The metrics of the dashboard: what a scrape serves from both stores, what it costs, and who may scrape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import create_engine, event

from celery_capacity.platform.web.application import Application
from celery_capacity.platform.web.http.security import Rates
from celery_capacity.platform.web.metrics.ended_jobs import EndedJobs
from celery_capacity.platform.web.metrics.exposition import MAX_SHAPES
from celery_capacity.platform.web.sources import Sources
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.supervision import metric_names
from celery_capacity.workers.supervision.metric_names import METRICS, Kind, Server, series_of
from tests.fixtures.servers.web import UNBOUNDED, serving
from tests.fixtures.stores.staged import Stage

#: Samples by name and labels.
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def sources_of(stage: Stage, engine: Any = None) -> Sources:
    stores = Stores(lambda _: stage.settings)
    stores._made.update(settings=stage.settings, engine=engine or stage.engine, ledger=stage.ledger)
    return Sources(stores, lambda: None)


def samples_of(exposition: bytes) -> Samples:
    families = text_string_to_metric_families(exposition.decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


class Scraped:
    """Samples of one scrape."""

    def __init__(self, exposition: bytes) -> None:
        self.samples = samples_of(exposition)

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples.get((name, frozenset(labels.items())))

    def names(self) -> set[str]:
        return {name for name, _ in self.samples if not name.endswith("_created")}


def scrape(sources: Sources) -> Scraped:
    return Scraped(sources.metrics())


def ended_counts(stage: Stage, ended: EndedJobs) -> Counter[str]:
    """Read the ended jobs up to now, and return those that were counted, by state."""
    with stage.engine.connect() as connection:
        ended.read(connection, settled=-1.0)
    return Counter({state: number for state, number in ended.states.items() if number})


def test_scrape_tells_capacity_backlog_and_jobs(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    jobs = [stage.submit(cpus=cpus) for cpus in (2000, 2000, 3000, 3000, 9000)]
    stage.start(jobs[0])
    seen = scrape(sources_of(stage))
    assert seen.value("platform_resource_capacity", resource="cpus", worker="a") == 4
    assert seen.value("platform_resource_allocated", resource="cpus", worker="a") == 4
    assert seen.value("platform_resource_allocated", resource="memory", worker="a") == 0
    states = {state: seen.value("platform_jobs", state=state) for state in ("running", "admitted", "waiting")}
    assert states == {"running": 1, "admitted": 1, "waiting": 3}
    assert seen.value("platform_backlog", shape="cpus=3 queue=celery") == 2
    assert seen.value("platform_backlog", shape="other") == 0
    assert (seen.value("platform_blocked_jobs"), seen.value("platform_authority", store="ledger")) == (1, 1)
    assert seen.value("platform_store_up", store="postgres") == seen.value("platform_store_up", store="redis") == 1


def test_scrape_serves_every_metric_of_the_dashboard(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.ledger.tally.add("duty.sweep.done", 3)
    sources = sources_of(stage)
    with stage.engine.connect() as connection:
        sources._ended.read(connection, settled=3600.0)
    job = stage.submit(cpus=1000)
    stage.start(job)
    stage.end(job)
    ended_counts(stage, sources._ended)
    seen = scrape(sources)
    served = [metric for metric in METRICS if Server.DASHBOARD in metric.served_by]
    histograms = {metric.name for metric in served if metric.kind is Kind.HISTOGRAM}
    expected = {series for metric in served for series in series_of(metric)} | {f"{name}_count" for name in histograms}
    assert seen.names() == expected
    assert seen.value("platform_duty_passes_total", duty="sweep", result="done") == 3
    assert seen.value("platform_run_seconds_count", task="task") == seen.value("platform_wait_seconds_count") == 1


def test_refusals_have_a_series_each_and_stale_writes_a_sum(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.ledger.tally.add(Refusal.STALE_PUBLISH, 2)
    stage.ledger.tally.add(Refusal.STALE_RELEASE, 3)
    stage.submit(cpus=1000)
    seen = scrape(sources_of(stage))
    assert seen.value("platform_refusals_total", reason="stale.publish") == 2
    assert seen.value("platform_refusals_total", reason="refused.invalid") == 0
    assert seen.value("platform_fenced_writes_total") == 5


def test_backlog_sums_shapes_beyond_the_bound_as_other(stage: Stage) -> None:
    for number in range(MAX_SHAPES + 7):
        stage.insert({"cpus": 1000 * (number + 1)})
    sources = sources_of(stage)
    sources.client = redis.Redis(port=1, socket_connect_timeout=1)
    seen = scrape(sources)
    shapes = {labels: value for (name, labels), value in seen.samples.items() if name == "platform_backlog"}
    assert len(shapes) == MAX_SHAPES + 1
    assert seen.value("platform_backlog", shape="other") == 7


def test_scrape_without_redis_comes_from_postgres_without_counters(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=9000)
    sources = sources_of(stage)
    sources.client = redis.Redis(port=1, socket_connect_timeout=1)
    seen = scrape(sources)
    assert seen.value("platform_store_up", store="redis") == 0
    assert seen.value("platform_backlog", shape="cpus=9 queue=celery") == 1
    assert (seen.value("platform_cache_hits_total"), seen.value("platform_cache_misses_total")) == (0, 1)
    assert seen.value("platform_refusals_total", reason="refused.invalid") is None


def test_scrape_without_postgres_comes_from_the_ledger(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    away = create_engine("postgresql+psycopg2://nobody@127.0.0.1:1/none")
    seen = scrape(sources_of(stage, away))
    assert seen.value("platform_store_up", store="postgres") == 0
    assert seen.value("platform_resource_capacity", resource="cpus", worker="a") == 4
    assert seen.value("platform_jobs", state="waiting") is None


@pytest.mark.parametrize("reachable", [True, False], ids=["ledger", "postgres"])
def test_scrape_costs_as_many_statements_for_a_large_backlog(reachable: bool, stage: Stage) -> None:
    stage.worker("a", cpus=1000)
    sources, statements = sources_of(stage), list[str]()
    if not reachable:
        sources.client = redis.Redis(port=1, socket_connect_timeout=1)
    event.listen(stage.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))

    def cost(scraped: Callable[[], Any]) -> int:
        statements.clear()
        scraped()
        return len(statements)

    scrape(sources)
    small = cost(lambda: scrape(sources))
    for number in range(40):
        stage.submit(cpus=2000 + 1000 * (number % 20))
    assert cost(lambda: scrape(sources)) == small < 20


def test_ended_job_counts_once_and_only_since_the_first_reading(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    jobs, ended = [stage.submit(cpus=1000) for _ in range(3)], EndedJobs()
    for job, outcome in zip(jobs, ("succeeded", "succeeded", "failed"), strict=True):
        stage.start(job)
        stage.end(job, outcome)
    stage.sql("UPDATE jobs SET finished_at = clock_timestamp() - interval '2 hours' WHERE id = :id", id=jobs[0])
    with stage.engine.connect() as connection:
        ended.read(connection, settled=3600.0)
    assert [ended_counts(stage, ended) for _ in range(2)] == [{"succeeded": 1, "failed": 1}] * 2


def test_job_whose_end_may_be_on_its_way_is_counted_later(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    job, ended = stage.submit(cpus=1000), EndedJobs()
    stage.start(job)
    with stage.engine.connect() as connection:
        ended.read(connection, settled=3600.0)
        stage.end(job)
        ended.read(connection, unapplied_age=60.0)
        assert not +ended.states
    assert ended_counts(stage, ended) == {"succeeded": 1}


def test_ended_jobs_are_counted_in_pieces_without_loss(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery_capacity.platform.web.metrics.ended_jobs.MAX_ROWS", 2)
    stage.worker("a", cpus=8000)
    ended = EndedJobs()
    with stage.engine.connect() as connection:
        ended.read(connection, settled=3600.0)
    for job in [stage.submit(cpus=1000) for _ in range(5)]:
        stage.start(job)
        stage.end(job)
    stage.sql("UPDATE jobs SET finished_at = clock_timestamp() - interval '1 s'")
    assert [ended_counts(stage, ended)["succeeded"] for _ in range(4)] == [2, 4, 5, 5]


def test_task_beyond_the_bound_counts_as_other(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery_capacity.platform.web.metrics.ended_jobs.MAX_TASKS", 1)
    stage.worker("a", cpus=8000)
    ended = EndedJobs()
    with stage.engine.connect() as connection:
        ended.read(connection, settled=3600.0)
    for number, job in enumerate([stage.submit(cpus=1000) for _ in range(3)]):
        stage.start(job)
        stage.end(job)
        stage.sql("UPDATE jobs SET name = :name WHERE id = :id", name=f"task-{number}", id=job)
    ended_counts(stage, ended)
    assert set(ended.runs) == {next(iter(ended.runs)), "other"}


def test_long_text_is_cut_as_label() -> None:
    assert len(metric_names.label_of("x" * 1000)) == metric_names.MAX_LABEL


def test_scrapes_at_once_share_one_reading(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery_capacity.platform.web.prepared.MAX_AGE", 3600.0)
    sources, readings = sources_of(stage), list[int]()
    read = sources.metrics

    def counted() -> bytes:
        readings.append(1)
        return read()

    monkeypatch.setattr(sources, "metrics", counted)
    with serving(Application(sources, rates=UNBOUNDED)) as url, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: httpx.get(f"{url}/metrics", timeout=60), range(16)))
    assert {answer.status_code for answer in answers} == {200}
    assert answers[0].headers["content-type"].startswith("text/plain; version=")
    assert len(readings) == 1


def test_scrape_needs_the_token_where_there_is_one(stage: Stage) -> None:
    with serving(Application(sources_of(stage), token="s" * 20, rates=Rates())) as url:
        refused = httpx.get(f"{url}/metrics", timeout=60)
        answer = httpx.get(f"{url}/metrics", timeout=60, headers={"Authorization": f"Bearer {'s' * 20}"})
    assert (refused.status_code, refused.json()["title"]) == (401, "a token is needed")
    assert b"platform_store_up" in answer.content
