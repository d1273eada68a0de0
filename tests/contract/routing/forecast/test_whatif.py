"""The copy of the cluster for a question "what if", and its answers under both authorities."""

from __future__ import annotations

from dataclasses import replace

import pytest
import redis

from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.forecast import cluster, whatif
from celery_capacity.routing.forecast.whatif import Today, read_today
from celery_capacity.routing.model.expected import RunTime
from celery_capacity.routing.model.request import Request, alternatives_term, alternatives_to_show
from celery_capacity.routing.model.states import Store
from celery_capacity.routing.policy.placement import Book
from celery_capacity.routing.policy.reservation import Rules
from celery_capacity.routing.policy.tenants import Rule
from celery_capacity.routing.simulation.forecast import changed, outcome
from tests.contract.routing.recovery.test_controls_tenants import set_rule
from tests.fixtures.stores.staged import Stage

MINUTE = RunTime(76_109, 76_109)
BIG = Book("big", {"cpus": 8000, "memory": 2**30, "slots": 10}, {})


def today(stage: Stage, client: redis.Redis | None = None) -> Today:
    stage.apply()
    with stage.engine.connect() as connection:
        return read_today(client or stage.redis, connection, stage.settings)


def test_added_worker_empties_the_backlog_earlier(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    for _ in range(5):
        stage.submit(cpus=4000, run_time=MINUTE)
    copy = today(stage)
    as_is, after = outcome(copy.cluster, copy.rules), outcome(changed(copy.cluster, [BIG]), copy.rules)
    assert (as_is.workers, after.workers) == (1, 2)
    assert as_is.empty_after is not None and as_is.empty_after > 3 * MINUTE.expected
    assert after.empty_after is not None and MINUTE.expected // 2 < after.empty_after <= 2 * MINUTE.expected
    assert after.waits.percentile(50) == 0
    assert list(after.by_kind) == [("task", "cpus=4000,slots=1")]


def test_kind_of_jobs_with_alternatives_has_each_of_them(stage: Stage) -> None:
    alternatives = [Request.of({"cpus": 9000, "gpus": 1}), Request.of({"cpus": 3000})]
    stage.worker("a", cpus=4000)
    stage.submit(cpus=4000, run_time=MINUTE)
    stage.submit(place=alternatives_term(alternatives), cpus=9000, gpus=1, run_time=MINUTE)
    copy = today(stage)
    ((_, shape),) = outcome(copy.cluster, copy.rules).by_kind
    assert list(alternatives_to_show(shape)) == alternatives


def test_jobs_of_tenants_start_by_their_turns(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    for _ in range(4):
        stage.submit(cpus=4000, run_time=MINUTE)
    assert outcome(today(stage).cluster, Rules(1)).by_tenant == {}
    stage.submit(cpus=4000, run_time=MINUTE, tenant="physics")
    copy = today(stage)
    waits = outcome(copy.cluster, Rules(1)).by_tenant
    assert (len(waits["default"].times), len(waits["physics"].times)) == (3, 1)
    # It came last, and its tenant holds nothing.
    assert waits["physics"].times[0] < waits["default"].times[0]


def test_quota_of_a_tenant_holds_its_jobs_back_in_a_forecast(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    set_rule(stage, "physics", Rule(quota={"cpus": 1000}))
    stage.submit(cpus=1000, run_time=MINUTE, tenant="physics")
    stage.submit(cpus=1000, run_time=MINUTE, tenant="physics")
    copy = today(stage)
    after = outcome(changed(copy.cluster, [BIG]), copy.rules)
    set_rule(stage, "physics", None)
    assert (len(copy.cluster.running), len(copy.cluster.waiting)) == (1, 1)
    assert after.waits.percentile(100) > MINUTE.expected // 2


def test_added_worker_is_filled_by_the_turns_of_tenants(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    for _ in range(8):
        stage.submit(cpus=4000, run_time=MINUTE)
    for _ in range(4):
        stage.submit(cpus=4000, run_time=MINUTE, tenant="physics")
    copy = today(stage)
    after = outcome(changed(copy.cluster, [BIG]), Rules(1))
    assert [waits.times.count(0) for _, waits in sorted(after.by_tenant.items())] == [1, 1]
    assert after.by_tenant["physics"].mean < after.by_tenant["default"].mean


def test_large_backlog_of_one_tenant_hides_no_other(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.worker("a", cpus=4000)
    for _ in range(6):
        stage.submit(cpus=4000, run_time=MINUTE)
    stage.submit(cpus=4000, run_time=MINUTE, tenant="physics")
    monkeypatch.setattr(whatif, "MAX_JOBS", 4)
    copy = today(stage)
    terms = [queued.waiting.terms for queued in copy.cluster.waiting]
    assert (terms, copy.cluster.beyond) == (["", "", ",$physics"], 3)
    monkeypatch.setattr(cluster, "MAX_TENANTS", 1)
    with pytest.raises(InvalidRequest, match="1,000 tenants"):
        today(stage)


def test_removed_worker_ends_its_jobs_and_takes_no_more(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.worker("b", cpus=2000)
    stage.submit(cpus=4000, run_time=MINUTE)
    stage.submit(cpus=2000, run_time=MINUTE)
    stage.submit(cpus=4000, run_time=MINUTE)
    stage.submit(cpus=2000, run_time=MINUTE)
    copy = today(stage)
    after = outcome(changed(copy.cluster, remove=["a"]), copy.rules)
    assert (after.waits.never, len(after.waits.times), after.empty_after) == (1, 1, None)


def test_unknown_run_times_are_the_median_of_the_known_ones(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=4000)
    stage.submit(cpus=4000, run_time=MINUTE)
    stage.submit(cpus=4000)
    copy = today(stage)
    assert (copy.guess, copy.cluster.guessed) == (MINUTE.expected, 2)
    assert not outcome(copy.cluster, copy.rules).waits.never


def test_jobs_stay_unknown_where_no_run_time_is_known(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=4000)
    stage.submit(cpus=4000)
    copy = today(stage)
    assert (copy.guess, copy.cluster.guessed) == (0, 2)
    assert outcome(copy.cluster, copy.rules).waits.never == 1


def test_forecast_without_the_ledger_has_the_usual_rules(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=4000, run_time=MINUTE)
    stage.submit(cpus=4000, run_time=MINUTE)
    stage.apply()
    stage.sql("UPDATE authority SET authority = 'postgres'")
    copy = today(stage, redis.Redis(port=1))
    stage.sql("UPDATE authority SET authority = 'ledger'")
    assert (copy.source, copy.rules, copy.tasks_known) == (Store.POSTGRES, Rules(), False)
    assert outcome(copy.cluster, copy.rules).empty_after


def test_unreachable_ledger_leaves_the_tasks_of_workers_unknown(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    assert not today(stage, redis.Redis(port=1)).tasks_known
    assert today(stage).tasks_known


def test_paused_jobs_are_left_out_and_large_backlogs_cut(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.worker("a", cpus=4000)
    for _ in range(4):
        stage.submit(cpus=4000, run_time=MINUTE)
    monkeypatch.setattr(whatif, "MAX_JOBS", 2)
    copy = today(stage)
    assert (len(copy.cluster.waiting), copy.cluster.beyond) == (2, 1)
    stage.sql("INSERT INTO pauses (kind, name, made_by) VALUES ('task', 'task', 'test')")
    assert not today(stage).cluster.waiting
    stage.sql("DELETE FROM pauses")


def test_too_large_a_cluster_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.worker("a", cpus=4000)
    monkeypatch.setattr(cluster, "MAX_WORKERS", 0)
    with pytest.raises(InvalidRequest, match="too large for a forecast"):
        today(stage)


def test_cordoned_worker_admits_nothing_in_a_forecast(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=4000, run_time=MINUTE)
    stage.submit(cpus=4000, run_time=MINUTE)
    stage.sql("INSERT INTO cordons (worker, made_by) VALUES ('a', 'test')")
    copy = today(stage)
    stage.sql("DELETE FROM cordons")
    assert outcome(copy.cluster, replace(copy.rules, depth=1)).waits.never == 1
