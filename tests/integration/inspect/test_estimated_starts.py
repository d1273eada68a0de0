"""The estimated start of a waiting job: what `explain` says of it, and the record of how wrong estimates were."""

from __future__ import annotations

from functools import partial

import pytest
from sqlalchemy import text

from celery_capacity.platform.console.estimates import start_sentence
from celery_capacity.platform.console.wording import details
from celery_capacity.routing.forecast import starts
from celery_capacity.routing.forecast.cluster import likely_run, live_books, read_cluster
from celery_capacity.routing.forecast.shares import read_shares
from celery_capacity.routing.forecast.starts import EstimatedStart
from celery_capacity.routing.inspect import verify
from celery_capacity.routing.inspect.explain import explain
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.expected import CLASSES, RunTime
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.policy.reservation import Rules
from celery_capacity.routing.simulation import forecast
from celery_capacity.routing.simulation.forecast import NoEstimate
from tests.fixtures.stores.staged import Stage

EASY = Rules(1)
MINUTE = RunTime(76_109, 76_109)
LONG = RunTime(3_444_312, 3_444_312)
#: Place of a job that needs an SSD.
SSD = ",?disk:in:ssd"


def estimate(stage: Stage, job: str, rules: Rules | None = EASY) -> EstimatedStart | None:
    stage.apply()
    with stage.engine.connect() as connection:
        explanation = explain(stage.redis, connection, job, rules=rules)
    assert explanation is not None
    return explanation.estimate


def test_start_is_estimated_by_the_ends_of_the_jobs_before(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=4000, run_time=MINUTE)
    stage.submit(cpus=4000, run_time=MINUTE)
    third = estimate(stage, stage.submit(cpus=4000, run_time=MINUTE))
    assert third is not None and third.seconds is not None
    assert 100 < third.seconds <= 2 * MINUTE.expected / 1000
    assert (third.simulated, third.extrapolated, third.errors) == (2, False, None)
    assert not third.without_reservations


def test_estimate_without_reservations_says_so(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=4000, run_time=MINUTE)
    monkeypatch.setattr(forecast, "MAX_WORK", 0)
    estimated = estimate(stage, stage.submit(cpus=4000, run_time=MINUTE))
    assert estimated is not None and estimated.to_json()["without_reservations"]
    assert "estimated without reservations" in start_sentence(estimated)


def test_start_is_not_estimated_where_a_run_time_is_unknown(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=4000)
    estimated = estimate(stage, stage.submit(cpus=4000, run_time=MINUTE))
    assert estimated is not None
    assert (estimated.at, estimated.why_not) == (None, NoEstimate.UNKNOWN_RUN_TIMES)


def test_mean_of_ended_jobs_stands_for_an_unknown_run_time(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=4000)
    stage.sql(
        "INSERT INTO run_times (task, request, expected_ms, spread_ms, count, weights)"
        " SELECT name, shape, 76109, 0, 9, jsonb_build_object('38', 1.0) FROM jobs"
    )
    estimated = estimate(stage, stage.submit(cpus=4000))
    assert estimated is not None and estimated.seconds is not None
    assert estimated.seconds == pytest.approx(CLASSES[38] / 1000 / 2**0.125, abs=20)


def test_short_job_passes_the_head_in_an_estimate_with_reservations(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=3000, run_time=LONG)
    stage.submit(cpus=4000, run_time=MINUTE)
    stage.submit(cpus=1000, run_time=MINUTE)
    short = stage.submit(cpus=1000, run_time=MINUTE)
    for depth in (0, 1):
        estimated = estimate(stage, short, Rules(depth))
        assert estimated is not None and estimated.seconds is not None
        assert estimated.seconds <= MINUTE.expected / 1000


def test_start_is_estimated_only_where_it_is_asked_for(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    running = stage.submit(cpus=4000, run_time=MINUTE)
    assert estimate(stage, running) is None
    assert estimate(stage, stage.submit(cpus=9000, run_time=MINUTE)) is None
    assert estimate(stage, stage.submit(cpus=4000, run_time=MINUTE), None) is None


def test_estimate_obeys_the_labels_of_workers(stage: Stage) -> None:
    stage.worker("a", cpus=4000, labels={"disk": "ssd"})
    stage.worker("b", cpus=4000)
    stage.submit(cpus=4000, run_time=LONG, place=SSD)
    stage.submit(cpus=4000, run_time=MINUTE)
    waiting = stage.submit(cpus=4000, run_time=MINUTE, place=SSD)
    estimated = estimate(stage, waiting)
    assert estimated is not None and estimated.seconds is not None
    assert estimated.seconds > MINUTE.expected / 1000
    with stage.engine.connect() as connection:
        assert starts.sample(connection, EASY, 3, 60.0) == 1
        error = connection.execute(text("SELECT starts_at - now() > interval '2 min' FROM estimates")).scalar_one()
    assert error


def test_start_is_estimated_by_the_turns_of_tenants(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    first = [stage.submit(cpus=4000, run_time=MINUTE) for _ in range(3)]
    estimated = estimate(stage, stage.submit(cpus=4000, run_time=MINUTE, tenant="physics"), Rules(0))
    assert estimated is not None and estimated.seconds is not None
    assert 0 < estimated.seconds <= MINUTE.expected / 1000
    later = estimate(stage, first[1], Rules(0))
    assert later is not None and later.seconds is not None
    assert later.seconds > MINUTE.expected / 1000
    with stage.engine.connect() as connection:
        shares = read_shares(connection, stage.redis, 600.0)
        assert shares is not None
        assert starts.sample(connection, EASY, 3, 60.0, shares) == 3


def test_past_use_of_a_tenant_delays_its_estimated_start(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=4000, run_time=MINUTE, tenant="art")
    other = stage.submit(cpus=4000, run_time=MINUTE, tenant="physics")
    stage.submit(cpus=4000, run_time=MINUTE, tenant="bio")
    stage.redis.hset(keys.PAST, "physics", "0.5")
    estimated = estimate(stage, other, Rules(0))
    stage.redis.delete(keys.PAST)
    assert estimated is not None and estimated.seconds is not None
    assert estimated.seconds > MINUTE.expected / 1000


def test_start_is_not_estimated_behind_too_many_jobs_of_tenants(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.worker("a", cpus=4000)
    jobs = [stage.submit(cpus=4000, run_time=MINUTE, tenant="physics") for _ in range(4)]
    monkeypatch.setattr(starts, "read_cluster", partial(read_cluster, most=2))
    estimated = estimate(stage, jobs[-1])
    assert estimated is not None
    assert (estimated.at, estimated.why_not) == (None, NoEstimate.TENANTS)


def test_start_is_estimated_from_rows_while_postgres_decides(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=4000, run_time=MINUTE)
    job = stage.submit(cpus=4000, run_time=MINUTE)
    stage.apply()
    stage.sql("UPDATE authority SET authority = 'postgres'")
    with stage.engine.connect() as connection:
        explanation = explain(stage.redis, connection, job, rules=Rules(1))
    stage.sql("UPDATE authority SET authority = 'ledger'")
    assert explanation is not None and explanation.why is Reason.LEDGER_STANDS_BACK
    assert explanation.estimate is not None and explanation.estimate.seconds is not None
    assert 0 < explanation.estimate.seconds <= MINUTE.expected / 1000


def test_job_beyond_those_simulated_is_estimated_by_their_pace(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.worker("a", cpus=4000)
    jobs = [stage.submit(cpus=4000, run_time=MINUTE) for _ in range(6)]
    stage.apply()
    with stage.engine.connect() as connection:
        row = stage.row(jobs[-1])
        monkeypatch.setattr(starts, "read_cluster", partial(read_cluster, most=2))
        books = live_books(connection, 60.0)
        estimated = starts.estimated_start(connection, jobs[-1], (row.priority, row.seq), books, Rules(0), 3)
    assert estimated is not None and estimated.seconds is not None
    assert (estimated.simulated, estimated.extrapolated) == (2, True)
    assert 4 * 60 < estimated.seconds <= 5 * MINUTE.expected / 1000


def test_learned_time_is_replaced_by_the_mean_and_a_declared_one_is_not() -> None:
    shape = f"cpus=1,slots=1,~{CLASSES[9]}"
    assert likely_run(CLASSES[9], shape, 7) == 7
    assert likely_run(CLASSES[9] - 1, shape, 7) == CLASSES[9] - 1
    assert likely_run(0, "cpus=1,slots=1", 7) == 7
    assert likely_run(0, "cpus=1,slots=1", 0) == 0


def test_sentence_has_the_start_and_the_errors_so_far(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=4000, run_time=MINUTE)
    job = stage.submit(cpus=4000, run_time=MINUTE)
    stage.sql("INSERT INTO estimates (job, starts_at, started_at) VALUES ('x', now(), now() + interval '20 s')")
    stage.apply()
    with stage.engine.connect() as connection:
        explanation = explain(stage.redis, connection, job, rules=Rules(1))
    assert explanation is not None
    sentence = details(explanation)[-1]
    assert sentence.startswith("It starts about ")
    assert sentence.endswith("; such estimates were off by 20 s in the median, 20 s in 9 of 10.")
    assert explanation.to_json()["estimate"]["errors"] == {"compared": 1, "median_seconds": 20.0, "p90_seconds": 20.0}


def test_verify_has_the_errors_of_estimates(stage: Stage) -> None:
    assert verify.check(stage.engine, stage.redis).estimates is None
    stage.sql("INSERT INTO estimates (job, starts_at, started_at) VALUES ('x', now(), now() - interval '4 s')")
    report = verify.check(stage.engine, stage.redis)
    assert report.to_json()["estimates"] == {"compared": 1, "median_seconds": 4.0, "p90_seconds": 4.0}
