"""The tools of `make bench-size`: workers that speak the real protocol, and a table of the results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest
from sqlalchemy import Engine, text

from benchmarks.size import stock
from benchmarks.size.crowd import Crowd
from benchmarks.size.drawing import PICTURE, svg
from benchmarks.size.figures import PARTS, Figure
from benchmarks.size.rates import CLIENTS, jobs_a_second
from benchmarks.size.report import Report, figures
from benchmarks.size.stock import Stock, worker_name
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.inspect import verify
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.snapshot import text as as_text
from celery_capacity.routing.recovery import rebuild, reconcile, transition_log
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.waiting import until


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    ledger = Ledger(settings)
    yield ledger
    ledger.client.close()


def autocommitted(engine: Engine) -> Engine:
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def test_a_crowd_takes_jobs_and_its_books_are_exact(
    engine: Engine, ledger: Ledger, submitter: Submitter, platform_environment: dict[str, str]
) -> None:
    rebuild.open_if_cold(autocommitted(engine), ledger)
    workers = Crowd(platform_environment, 3, 2, cpus=2, hold=0.05, tasks=["tests.fixtures.tasks.add"])
    try:
        assert {as_text(name) for name in ledger.client.zrange(keys.LEASES, 0, -1)} == set(map(worker_name, range(3)))
        jobs = [submitter.send("tests.fixtures.tasks.add", 1, 2) for _ in range(30)]
        for job in jobs:
            assert submitter.ended(job).state == "succeeded"
        assert {submitter.row(job).attempt for job in jobs} == {1}
        assert {submitter.row(job).worker for job in jobs} == set(map(worker_name, range(3)))
        until(lambda: not ledger.client.xlen(keys.STREAM), "Postgres has all that the workers said")
        assert verify.check(engine, ledger.client, at_rest=True).lines() == []
        assert workers.troubles() == []
    finally:
        workers.end()


def test_a_crowd_that_holds_jobs_says_so_to_an_emptied_ledger(
    engine: Engine, ledger: Ledger, platform_environment: dict[str, str]
) -> None:
    server = autocommitted(engine)
    with server.connect() as connection:
        stock.fill(connection, Stock(2, running=4, waiting=60))
    workers = Crowd(platform_environment, 2, 1, cpus=stock.CPUS * 2)
    try:
        done = rebuild.open_if_cold(server, ledger)
        assert done is not None
        assert (done.workers, done.held, done.filed) == (2, 4, 60)
        transition_log.apply_all(server, ledger)
        until(lambda: ledger.client.zcard(keys.FREE) == 2, "both workers are open again")
        with server.connect() as connection:
            before = "SELECT count(*) FROM jobs WHERE state = 'running' AND epoch = 1 AND attempt = 1"
            assert connection.execute(text(before)).scalar_one() == 4
        assert verify.check(engine, ledger.client).lines() == []
        assert reconcile.reconcile(server, ledger).drift == 0
        assert workers.troubles() == []
    finally:
        workers.end()


def test_the_worst_round_is_judged() -> None:
    values = {"reconcile_s": [2.0, 3.5], "workers_registered": [1000.0, 999.0], "archive_statement_ms": [5.0]}
    report = Report("about", values)
    assert [figure.name for figure in report.missed()] == ["reconcile_s", "workers_registered"]
    figures = {line[0]: line[2:6] for line in report.lines()}
    assert figures == {
        "`reconcile_s`": ("3.5", "2, 3.5", "≤ 3", "no"),
        "`workers_registered`": ("999", "1,000, 999", "≥ 1,000", "no"),
        "`archive_statement_ms`": ("5", "5", "–", "–"),
    }


def test_what_was_not_measured_stays_as_it_was() -> None:
    earlier, later = Report("then", {"a": [1.0], "b": [2.0]}), Report("now", {"b": [3.0]})
    assert later.over(earlier) == Report("now", {"a": [1.0], "b": [3.0]})
    assert json.loads(later.as_json()) == {"about": "now", "values": {"b": [3.0]}}


def test_rate_is_what_heartbeats_leave_of_a_core() -> None:
    assert jobs_a_second(400.0, 100.0, 0) == pytest.approx(2000)
    assert jobs_a_second(400.0, 100.0, 40_000) == pytest.approx(1000)
    assert jobs_a_second(400.0, 100.0, 100_000) == 0


def test_picture_of_the_rates_is_the_one_of_the_results() -> None:
    values = Report.read().values
    picture = svg({n: (max(values[f"rate_job_us_{n}"]), max(values[f"rate_beat_us_{n}"])) for n in CLIENTS})
    assert picture == PICTURE.read_text(encoding="utf-8")
    root = ElementTree.fromstring(picture)
    labels = [text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert sum("at once" in label for label in labels) == len(CLIENTS)


def test_no_two_figures_have_one_name_and_none_has_two_targets() -> None:
    all_of_them: list[Figure] = list(figures())
    assert len({figure.name for figure in all_of_them}) == len(all_of_them)
    assert not [figure for figure in all_of_them if figure.at_most is not None and figure.at_least is not None]
    parts = {"reconcile", "rebuild", "head", "workers", "ledger", "rules", "rates", "retention", "bulk", "page"}
    parts |= {"seen", "flood"}
    assert set(PARTS) == parts
