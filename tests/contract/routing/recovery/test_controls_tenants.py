"""Rules of tenants are durable in Postgres, and the ledger obeys them from the copy on."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text

from celery_capacity.platform.console import wording
from celery_capacity.routing.database import tenants
from celery_capacity.routing.errors import BacklogFull, InvalidRequest
from celery_capacity.routing.inspect.backlog_limit import COUNT_FOR, TRUST, TenantLimit
from celery_capacity.routing.inspect.explain import explain
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.ledger.replies import Ended
from celery_capacity.routing.model.expected import RunTime, expected_class
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import Request, alternatives_term
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import Book
from celery_capacity.routing.policy.reservation import Rules
from celery_capacity.routing.policy.tenants import Rule
from celery_capacity.routing.recovery import controls as copies
from celery_capacity.routing.recovery.drift import Reconciled
from celery_capacity.routing.recovery.reconcile import reconcile
from celery_capacity.routing.recovery.reconcile_indexes import check_use
from celery_capacity.routing.recovery.reservations import Memory, renew_reservations
from celery_capacity.routing.store import claims, controls
from celery_capacity.workers.client.tenants import check_rule
from celery_capacity.workers.process.stores import transactions
from tests.fixtures.stores.books import MOST_LOSSES
from tests.fixtures.stores.staged import Stage


def set_rule(stage: Stage, name: str, rule: Rule | None) -> None:
    """Make or remove a rule, and copy it to the ledger."""
    with transactions(stage.engine).begin() as connection:
        controls.lock(connection)
        if rule is None:
            assert controls.remove_tenant(connection, name, "ann@desk")
        else:
            controls.set_tenant(connection, name, rule, "ann@desk")
    copies.level(stage.engine, stage.ledger)


def test_rule_reaches_the_ledger_and_leaves_it(stage: Stage) -> None:
    rule = Rule(3, {"cpus": 2000}, {"cpus": 4000, "memory": 2**30}, 7)
    set_rule(stage, "physics", rule)
    with stage.engine.connect() as connection:
        assert tenants.tenant_rules(connection) == {"physics": rule}
    assert stage.redis.hgetall(keys.TENANTS) == {b"physics": b"3;cpus=2000;cpus=4000,memory=1073741824"}
    assert stage.redis.hget(keys.EPOCH, "tenants") == b"1"
    set_rule(stage, "physics", None)
    assert stage.redis.hgetall(keys.TENANTS) == {}
    with stage.engine.connect() as connection:
        actions = connection.execute(text("SELECT action, target, made_by FROM operator_actions ORDER BY seq")).all()
    assert [tuple(action) for action in actions] == [
        ("tenant", "tenant:physics", "ann@desk"),
        ("remove-tenant", "tenant:physics", "ann@desk"),
    ]


def test_quota_files_a_job_beside_free_room_until_another_ends(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    set_rule(stage, "physics", Rule(quota={"slots": 1}))
    first, second = (stage.submit(tenant="physics", cpus=1000) for _ in range(2))
    other = stage.submit(cpus=1000)
    assert [stage.row(job).state for job in (first, second, other)] == ["admitted", "waiting", "admitted"]
    stage.start(first)
    stage.end(first)
    assert stage.row(second).state == "admitted"
    finish(stage, second, other)


def test_larger_quota_starts_waiting_jobs_at_once(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    set_rule(stage, "physics", Rule(quota={"slots": 1}))
    first, second = (stage.submit(tenant="physics", cpus=1000) for _ in range(2))
    assert stage.row(second).state == "waiting"
    set_rule(stage, "physics", Rule(quota={"slots": 2}))
    stage.apply()
    assert stage.row(second).state == "admitted"
    finish(stage, first, second)


@pytest.mark.parametrize("tenant", ["physics", "default"])
def test_end_starts_job_on_another_worker_that_a_quota_held(stage: Stage, tenant: str) -> None:
    stage.worker("a", cpus=1000)
    set_rule(stage, tenant, Rule(quota={"slots": 1}))
    first = stage.submit(tenant=tenant, cpus=1000)
    stage.worker("b", cpus=4000)
    wide = stage.submit(tenant=tenant, cpus=2000)
    assert [stage.row(job).state for job in (first, wide)] == ["admitted", "waiting"]
    stage.start(first)
    row = stage.row(first)
    ended = Ended(first, Token(row.epoch, row.attempt), Outcome.SUCCEEDED)
    settled = stage.ledger.settle(row.worker, row.incarnation, ended=[ended], most_losses=MOST_LOSSES)
    stage.ledger.follow(row.worker, settled)
    stage.apply()
    assert (stage.row(wide).state, stage.row(wide).worker) == ("admitted", "b")
    finish(stage, wide)


def why(stage: Stage, job: str) -> tuple[Reason, str]:
    """Return the reason why a job waits, and its resource."""
    with stage.engine.connect() as connection:
        explanation = explain(stage.redis, connection, job)
    assert explanation is not None
    return explanation.why, explanation.resource or ""


def test_explanation_leaves_out_an_alternative_that_a_quota_holds(stage: Stage) -> None:
    stage.worker("a", cpus=4000, gpus=1)
    set_rule(stage, "physics", Rule(quota={"gpus": 0}))
    stage.submit(cpus=3000)
    term = alternatives_term([Request.of({"cpus": 1000, "gpus": 1}), Request.of({"cpus": 2000})])
    job = stage.submit(tenant="physics", place=term, cpus=1000, gpus=1)
    assert stage.row(job).state == "waiting"
    assert why(stage, job) == (Reason.NO_ROOM, "cpus")


def test_explanation_tells_each_alternative_that_a_quota_holds(stage: Stage) -> None:
    stage.worker("a", cpus=40_000, gpus=2)
    set_rule(stage, "physics", Rule(quota={"gpus": 0, "cpus": 9000}))
    alternatives = [Request.of({"cpus": 1000, "gpus": 2}), Request.of({"cpus": 32_000})]
    job = stage.submit(tenant="physics", place=alternatives_term(alternatives), cpus=1000, gpus=2)
    single = stage.submit(tenant="physics", cpus=32_000)
    with stage.engine.connect() as connection:
        explanation, other = (explain(stage.redis, connection, it) for it in (job, single))
    assert explanation is not None
    assert other is not None
    assert (explanation.why, other.why, other.over_quota) == (Reason.TENANT_QUOTA, Reason.TENANT_QUOTA, ())
    lines = [(line.request, line.resource, line.asked, line.free) for line in explanation.over_quota]
    assert lines == [(alternatives[0], "gpus", 2, 0), (alternatives[1], "cpus", 32_000, 9000)]
    assert explanation.to_json()["over_quota"][1] == {
        "request": {"cpus": 32, "slots": 1}, "resource": "cpus", "asked": 32, "free": 9,
    }  # fmt: skip
    assert wording.details(explanation)[:2] == [
        "The alternative of 1 CPU, 2 gpus needs 2 gpus, and the quota leaves 0 gpus.",
        "The alternative of 32 CPUs needs 32 CPUs, and the quota leaves 9 CPUs.",
    ]


def test_end_starts_job_elsewhere_by_an_alternative_a_quota_held(stage: Stage) -> None:
    stage.worker("a", cpus=1000, gpus=1)
    set_rule(stage, "physics", Rule(quota={"gpus": 1}))
    first = stage.submit(tenant="physics", cpus=1000, gpus=1)
    stage.worker("b", cpus=4000, gpus=1)
    term = alternatives_term([Request.of({"cpus": 9000}), Request.of({"cpus": 2000, "gpus": 1})])
    second = stage.submit(tenant="physics", place=term, cpus=9000)
    assert [stage.row(job).state for job in (first, second)] == ["admitted", "waiting"]
    assert why(stage, second) == (Reason.TENANT_QUOTA, "gpus")
    stage.start(first)
    row = stage.row(first)
    ended = Ended(first, Token(row.epoch, row.attempt), Outcome.SUCCEEDED)
    settled = stage.ledger.settle(row.worker, row.incarnation, ended=[ended], most_losses=MOST_LOSSES)
    stage.ledger.follow(row.worker, settled)
    stage.apply()
    row = stage.row(second)
    assert (row.state, row.worker, row.request) == ("admitted", "b", {"cpus": 2, "gpus": 1, "slots": 1})
    finish(stage, second)


def test_quota_counts_what_ran_before_tenants_were_in_use(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    jobs = [stage.submit(cpus=1000) for _ in range(2)]
    set_rule(stage, "default", Rule(quota={"slots": 2}))
    jobs.append(stage.submit(cpus=1000))
    assert [stage.row(job).state for job in jobs] == ["admitted", "admitted", "waiting"]
    stage.start(jobs[0])
    stage.end(jobs[0])
    assert stage.row(jobs[2]).state == "admitted"
    finish(stage, *jobs[1:])


def test_reconcile_makes_damaged_use_the_sum_of_the_jobs(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    jobs = [stage.submit(tenant=tenant, cpus=1000) for tenant in ("physics", "bio", "default")]
    right = stage.redis.hgetall(keys.USED)
    stage.redis.hset(keys.USED, mapping={"physics/cpus": 9000, "gone/slots": 3})
    stage.redis.hdel(keys.USED, "bio/slots")
    assert reconcile(stage.engine, stage.ledger).drift == 3
    assert stage.redis.hgetall(keys.USED) == right
    assert reconcile(stage.engine, stage.ledger).drift == 0
    finish(stage, *jobs)


def test_use_that_changed_since_it_was_read_is_not_set(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    job = stage.submit(tenant="physics", cpus=1000)
    assert stage.ledger.set_use({"physics/cpus": (500, 0), "physics/slots": (0, 7)}, stage.ledger.newest_entry()) == 0
    assert stage.redis.hgetall(keys.USED) == {b"physics/cpus": b"1000", b"physics/slots": b"1"}
    finish(stage, job)


def test_use_stays_where_an_end_and_a_start_leave_it_equal(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.worker("a", cpus=4000)
    jobs = [stage.submit(tenant="physics", cpus=1000)]
    stage.start(jobs[0])
    right = stage.redis.hgetall(keys.USED)
    read = snapshot.read_cards

    def read_late(*arguments: Any) -> Any:
        # The job was listed, and ends before it is read. Another one starts in its place.
        stage.end(jobs[0])
        jobs.append(stage.submit(tenant="physics", cpus=1000))
        monkeypatch.undo()
        return read(*arguments)

    monkeypatch.setattr(snapshot, "read_cards", read_late)
    result = Reconciled()
    check_use(stage.ledger, {"a"}, result)
    assert (len(jobs), result.drift, stage.redis.hgetall(keys.USED)) == (2, 0, right)
    finish(stage, jobs[1])


def test_reconcile_counts_what_ran_before_tenants_were_in_use(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    before, named = stage.submit(cpus=1000), stage.submit(tenant="physics", cpus=1000)
    physics = {b"physics/cpus": b"1000", b"physics/slots": b"1"}
    assert stage.redis.hgetall(keys.USED) == physics
    assert reconcile(stage.engine, stage.ledger).drift == 0
    assert stage.redis.hgetall(keys.USED) == physics | {b"default/cpus": b"1000", b"default/slots": b"1"}
    finish(stage, before, named)


def finish(stage: Stage, *jobs: str) -> None:
    for job in jobs:
        stage.start(job)
        stage.end(job)
    assert stage.redis.hgetall(keys.USED) == {}


def test_capacity_of_all_workers_is_told_while_tenants_are_in_use(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    copies.refresh_shares(stage.engine, stage.ledger)
    assert stage.redis.hgetall(keys.TOTALS) == {}
    job = stage.submit(tenant="physics", cpus=1000)
    stage.redis.hset(keys.PAST, "physics", "0.5")
    stage.redis.hset(keys.EPOCH, "aged", str(stage.ledger.now_ms() - 600_000))
    copies.refresh_shares(stage.engine, stage.ledger)
    left: Any = stage.redis.hget(keys.PAST, "physics")
    assert float(left) == pytest.approx(0.25, rel=0.01)
    assert stage.redis.hget(keys.TOTALS, "cpus") == b"4000"
    assert stage.redis.hgetall(keys.USED) == {b"physics/cpus": b"1000", b"physics/slots": b"1"}
    finish(stage, job)


def test_first_worker_is_filled_by_the_turns_of_tenants(stage: Stage) -> None:
    # The jobs of the flood come first, and no runner has told the capacity of all workers yet.
    flood = [stage.submit(tenant="flood", cpus=1000) for _ in range(4)]
    modest = [stage.submit(tenant="modest", cpus=1000) for _ in range(4)]
    stage.worker("a", cpus=4000)
    stage.apply()
    admitted = [job for job in flood + modest if stage.row(job).state == "admitted"]
    assert admitted == flood[:2] + modest[:2]
    assert stage.redis.hget(keys.TOTALS, "cpus") == b"4000"
    # The next worker does not change what the runner tells.
    stage.worker("b", cpus=4000)
    stage.apply()
    assert all(stage.row(job).state == "admitted" for job in flood + modest)
    finish(stage, *flood, *modest)


def test_nominal_share_above_the_quota_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="exceeds the quota"):
        check_rule(Rule(nominal={"cpus": 2000}, quota={"cpus": 1000}), "physics")
    assert check_rule(Rule(nominal={"cpus": 2000}, quota={"memory": 1}), "physics").weight == 1


def test_pull_takes_the_first_job_of_the_tenant_below_its_share(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    # A flood of one tenant is longer than a page of rows.
    for _ in range(claims.PAGE + 5):
        stage.insert({"cpus": 1000}, tenant="flood")
    modest, plain = stage.insert({"cpus": 1000}, tenant="modest"), stage.insert({"cpus": 1000})
    with stage.engine.connect() as connection:
        chosen = claims.look(connection, Book("w", {"cpus": 4000, "slots": 4}, {}), MOST_LOSSES)
        assert {modest, plain} < {row.job for row in chosen}
        assert len(chosen) == 4
        with transactions(stage.engine).begin() as writing:
            controls.set_tenant(writing, "flood", Rule(quota={"slots": 0}), "ann@desk")
        chosen = claims.look(connection, Book("w", {"cpus": 4000, "slots": 4}, {}), MOST_LOSSES)
        assert {row.job for row in chosen} == {modest, plain}
        controls.remove_tenant(connection, "flood", "ann@desk")
    stage.sql("UPDATE jobs SET revoked_at = now()")


def test_pull_reads_one_page_of_jobs_that_a_quota_holds_back(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.worker("a", cpus=4000)
    for _ in range(2 * claims.PAGE + 1):
        stage.insert({"cpus": 1000}, tenant="flood")
    last = stage.insert({"cpus": 500}, tenant="modest")
    set_rule(stage, "flood", Rule(quota={"slots": 0}))
    set_rule(stage, "modest", Rule(quota={"slots": 0}))
    pages, read = [], claims.candidates

    def counted(*arguments: Any) -> list[claims.Candidate]:
        pages.append(read(*arguments))
        return pages[-1]

    monkeypatch.setattr(claims, "candidates", counted)
    with stage.engine.connect() as connection:
        assert claims.look(connection, Book("w", {"cpus": 4000, "slots": 4}, {}), MOST_LOSSES) == []
    # The first three pages have the first jobs of each tenant. Then come a page of the flood, and the rest.
    assert [len(page) for page in pages[3:]] == [claims.PAGE, 1]
    assert [row.job for row in pages[-1]] == [last]
    stage.sql("UPDATE jobs SET revoked_at = now()")


def test_quota_holds_an_exclusive_job_back_from_a_pull(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.insert({"alone": 1, "cpus": 1000, "slots": 1}, tenant="physics")
    set_rule(stage, "physics", Rule(quota={"cpus": 500}))
    with stage.engine.connect() as connection:
        assert claims.look(connection, Book("w", {"cpus": 4000, "slots": 4}, {}), MOST_LOSSES) == []
    stage.sql("UPDATE jobs SET revoked_at = now()")


def test_pull_leaves_an_exclusive_job_that_a_quota_holds_back(stage: Stage) -> None:
    alone = stage.insert({"cpus": 1000, "alone": 1}, place=",+exclusive", tenant="physics")
    plain = stage.insert({"cpus": 1000})
    set_rule(stage, "physics", Rule(quota={"slots": 0}))
    book = Book("w", {"cpus": 4000, "slots": 4}, {})
    with stage.engine.connect() as connection:
        assert [row.job for row in claims.look(connection, book, MOST_LOSSES)] == [plain]
    set_rule(stage, "physics", Rule(quota={"slots": 1}))
    with stage.engine.connect() as connection:
        assert [row.job for row in claims.look(connection, book, MOST_LOSSES)] == [alone]
    stage.sql("UPDATE jobs SET revoked_at = now()")


def test_waiting_job_says_that_a_quota_or_a_share_holds_it_back(stage: Stage) -> None:
    stage.worker("a", cpus=2000)
    set_rule(stage, "small", Rule(quota={"cpus": 500}))
    running = [stage.submit(tenant="flood", cpus=1000) for _ in range(2)]
    blocked, behind = stage.submit(tenant="small", cpus=1000), stage.submit(tenant="flood", cpus=1000)
    modest = stage.submit(cpus=1000)
    with stage.engine.connect() as connection:
        whys = [explain(stage.redis, connection, job) for job in (blocked, behind, modest)]
    assert [(why.why, why.tenant) for why in whys if why] == [
        (Reason.TENANT_QUOTA, "small"),
        (Reason.TENANT_SHARE, "default"),
        (Reason.NO_ROOM, None),
    ]
    set_rule(stage, "small", None)
    waiting = {*running, modest, blocked, behind}
    while waiting:
        job = next(job for job in sorted(waiting) if stage.row(job).state == "admitted")
        stage.start(job)
        stage.end(job)
        waiting.remove(job)
    finish(stage)


def test_job_beside_a_reservation_says_whose_turn_comes_first(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    time = expected_class(2**20)
    jobs = [stage.submit(tenant=name, cpus=1000, run_time=RunTime(time, time)) for name in ("art", "physics")]
    jobs.append(stage.submit(tenant="physics", cpus=4000))
    renew_reservations(stage.ledger, Rules(), Memory())
    behind = stage.submit(tenant="art", cpus=1000)
    # No script has looked at this job yet. Its tenant has the first turn, so that it passes the reservation.
    passing = stage.insert({"cpus": 1000}, tenant="bio")
    with stage.engine.connect() as connection:
        whys = [explain(stage.redis, connection, job) for job in (behind, passing)]
    assert [(why.why, why.worker, why.tenant) for why in whys if why] == [
        (Reason.RESERVED, "a", "physics"),
        (Reason.ON_ITS_WAY, "a", None),
    ]
    stage.sql("UPDATE jobs SET revoked_at = now() WHERE id = :id", id=passing)
    for job in (*jobs, behind):
        stage.start(job)
        stage.end(job)
    finish(stage)


def test_slow_count_of_a_tenant_is_trusted_for_longer(stage: Stage) -> None:
    now, asked = [0.0], []

    def engine() -> Any:
        asked.append(now[0])
        now[0] += 1.0
        return stage.engine

    limit = TenantLimit(engine, lambda: now[0])
    for _ in range(2):
        limit.check("cpus=1000,slots=1,$physics")
        now[0] += COUNT_FOR
    assert asked == [0.0]
    now[0] += TRUST
    limit.check("cpus=1000,slots=1,$physics")
    assert len(asked) == 2


def test_submission_is_refused_while_too_many_jobs_of_its_tenant_wait(stage: Stage) -> None:
    now = [0.0]
    limit = TenantLimit(lambda: stage.engine, lambda: now[0])
    shape = stage.row(stage.insert({"cpus": 1000}, tenant="physics")).shape
    limit.check(shape)
    set_rule(stage, "physics", Rule(max_waiting=2))
    # A count is trusted for a while.
    limit.check(shape)
    now[0] += COUNT_FOR
    limit.check(shape)
    stage.insert({"cpus": 1000}, tenant="physics")
    with pytest.raises(BacklogFull, match="2 jobs or more of tenant physics wait"):
        limit.check(shape)
    limit.check(stage.row(stage.insert({"cpus": 1000})).shape)
    set_rule(stage, "physics", None)
    now[0] += COUNT_FOR
    limit.check(shape)
    stage.sql("UPDATE jobs SET revoked_at = now()")
