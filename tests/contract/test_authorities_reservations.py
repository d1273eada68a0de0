"""Reservations under both authorities: a blocked job gets its turn whichever store decides."""

from __future__ import annotations

from typing import Final

import pytest

from celery_capacity.routing.fallback import reservations as without_ledger
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.expected import RunTime
from celery_capacity.routing.model.request import Request, alternatives_term
from celery_capacity.routing.policy.pauses import Kind, Scope
from celery_capacity.routing.policy.placement import Waiting
from celery_capacity.routing.policy.reservation import Patience, Rules
from celery_capacity.routing.recovery import reservations as with_ledger
from celery_capacity.workers.client import controls
from celery_capacity.workers.client.tenants import set_tenant
from tests.fixtures.stores.authorities import Authority, PostgresDecides
from tests.fixtures.stores.staged import MOST_LOSSES

#: A head is blocked for ever before a worker is kept for it, or not at all.
TIMED, AT_ONCE = Rules(1, 10**9), Rules(1, 0)
SHORT, LONG = RunTime(1024, 1024), RunTime(2**20, 2**20)
#: Seconds for which a worker counts as live.
TTL: Final = 60.0


class Passed(Patience):
    """Every running job came after the head, so that all of them have passed it."""

    def since(self, head: Waiting, now: int) -> int:
        super().since(head, now)
        return 0


class Runner:
    """The runner of the duties, which has its memory from one look to the next."""

    def __init__(self, authority: Authority, rules: Rules) -> None:
        self._authority, self._rules = authority, rules
        patience = Patience() if rules.reserve_after else Passed()
        self._with_ledger = with_ledger.Memory(patience)
        self._without = without_ledger.Memory(authority.stage.ledger.epoch, patience)

    def look(self) -> dict[str, int]:
        """Make the reservations anew; return the counts that are not 0, without the admissions."""
        stage = self._authority.stage
        if isinstance(self._authority, PostgresDecides):
            with stage.engine.connect() as connection:
                counts = without_ledger.renew_reservations(connection, self._rules, self._without, TTL, MOST_LOSSES)
        else:
            counts = with_ledger.renew_reservations(stage.ledger, self._rules, self._with_ledger)
        return {name: count for name, count in counts.items() if count and name != "admitted"}

    def reserved(self) -> list[str]:
        """Return the workers that are reserved."""
        stage = self._authority.stage
        if isinstance(self._authority, PostgresDecides):
            with stage.engine.connect() as connection:
                return sorted(connection.exec_driver_sql("SELECT worker FROM reservations").scalars())
        workers: list[bytes] = stage.redis.hvals(keys.KEYS["kept"])  # type: ignore[assignment]
        return sorted(worker.decode() for worker in workers)


def test_timed_reservation_lets_only_jobs_pass_that_end_in_time(authority: Authority) -> None:
    runner = Runner(authority, TIMED)
    authority.worker("a", cpus=2000)
    running = authority.submit(cpus=1000, run_time=LONG)
    assert authority.starts("a") == [running]
    wide = authority.submit(cpus=2000)
    assert runner.look() == {"reserved": 1}
    longer = authority.submit(cpus=1000, run_time=RunTime(2**21, 2**21))
    unknown = authority.submit(cpus=1000)
    assert authority.starts("a") == []
    short = authority.submit(cpus=1000, run_time=SHORT)
    assert authority.starts("a") == [short]
    authority.end(short)
    assert authority.starts("a") == []
    authority.end(running)
    assert authority.starts("a") == [wide]
    assert authority.waits(longer)
    authority.end(wide)
    assert authority.starts("a") == [longer, unknown]
    runner.look()
    assert runner.reserved() == []


def test_room_beside_the_head_is_given_away_once(authority: Authority) -> None:
    runner = Runner(authority, AT_ONCE)
    authority.worker("a", cpus=4000)
    running = authority.submit(cpus=2000)
    assert authority.starts("a") == [running]
    wide = authority.submit(cpus=3000)
    assert runner.look() == {"reserved": 1, "kept": 1}
    beside, waits = authority.submit(cpus=1000), authority.submit(cpus=1000)
    assert authority.starts("a") == [beside]
    runner.look()
    assert authority.starts("a") == []
    authority.end(running)
    assert authority.starts("a") == [wide]
    assert authority.waits(waits)
    authority.end(beside)
    assert authority.starts("a") == [waits]


def test_earlier_job_ignores_the_reservation(authority: Authority) -> None:
    runner = Runner(authority, AT_ONCE)
    authority.worker("a", cpus=2000)
    authority.submit(cpus=1000)
    assert len(authority.starts("a")) == 1
    authority.submit(cpus=2000)
    runner.look()
    later, earlier = authority.submit(cpus=1000), authority.submit(cpus=1000, priority=1)
    assert authority.starts("a") == [earlier]
    assert authority.waits(later)


def test_no_worker_is_reserved_without_a_depth(authority: Authority) -> None:
    runner = Runner(authority, Rules(0, 0))
    authority.worker("a", cpus=2000)
    authority.submit(cpus=1000)
    authority.starts("a")
    authority.submit(cpus=2000)
    assert (runner.look(), runner.reserved()) == ({}, [])
    later = authority.submit(cpus=1000)
    assert authority.starts("a") == [later]


def test_unknown_times_reserve_nothing_before_their_time(authority: Authority) -> None:
    runner = Runner(authority, TIMED)
    authority.worker("a", cpus=2000)
    authority.submit(cpus=1000)
    authority.starts("a")
    authority.submit(cpus=2000)
    assert (runner.look(), runner.reserved()) == ({}, [])


@pytest.mark.parametrize("how", ["revoked", "paused", "cordoned"])
def test_reservation_ends_with_the_head_or_the_worker(authority: Authority, how: str) -> None:
    runner = Runner(authority, AT_ONCE)
    authority.worker("a", cpus=2000)
    authority.submit(cpus=1000)
    authority.starts("a")
    wide = authority.submit(cpus=2000)
    assert runner.look()["kept"] == 1
    if how == "revoked":
        authority.revoke(wide)
    elif how == "paused":
        controls.pause(authority.stores, Scope(Kind.PLATFORM))
    else:
        controls.cordon(authority.stores, ["a"], reason="fan", by="ann")
    runner.look()
    assert runner.reserved() == []
    if how == "revoked":
        later = authority.submit(cpus=1000)
        assert authority.starts("a") == [later]


def test_each_of_two_heads_reserves_a_worker_of_its_own(authority: Authority) -> None:
    runner = Runner(authority, Rules(2, 0))
    for name in ("a", "b"):
        authority.worker(name, cpus=4000)
    running = [authority.submit(cpus=3000) for _ in range(2)]
    assert authority.starts("a") + authority.starts("b") == running
    lower, higher = authority.submit(cpus=4000), authority.submit(cpus=2000, priority=5)
    assert runner.look() == {"reserved": 2, "kept": 2}
    assert runner.reserved() == ["a", "b"]
    # Room for the higher one is its own, also on the worker that is reserved for the lower one.
    authority.end(running[0])
    assert authority.starts("a") == [higher]
    later = authority.submit(cpus=1000)
    runner.look()
    authority.end(running[1])
    assert authority.starts("b") == [lower]
    assert authority.starts("a") == [later]


def test_reservation_moves_where_its_worker_is_lost(authority: Authority) -> None:
    runner = Runner(authority, AT_ONCE)
    for name in ("a", "b"):
        authority.worker(name, cpus=2000)
    running = {name: authority.submit(cpus=1500) for name in ("a", "b")}
    for name in ("a", "b"):
        assert authority.starts(name) == [running[name]]
    wide = authority.submit(cpus=2000)
    runner.look()
    assert runner.reserved() == ["a"]
    authority.lose("a")
    # The lost job comes back, and comes before the wide one.
    runner.look()
    assert runner.reserved() == ["b"]
    authority.end(running["b"])
    assert authority.starts("b") == [running["a"]]
    runner.look()
    later = authority.submit(cpus=500)
    assert authority.starts("b") == []
    authority.end(running["a"])
    assert authority.starts("b") == [wide]
    assert authority.waits(later)


#: Alternatives of a job that runs on a GPU, or on two CPUs.
GPU_OR_CPUS: Final = alternatives_term([Request.of({"cpus": 1000, "gpus": 1}), Request.of({"cpus": 2000})])


def test_head_reserves_by_its_first_alternative_that_fits_a_worker(authority: Authority) -> None:
    runner = Runner(authority, AT_ONCE)
    authority.worker("a", cpus=2000)
    running = authority.submit(cpus=1000)
    assert authority.starts("a") == [running]
    head = authority.submit(cpus=1000, gpus=1, terms=GPU_OR_CPUS)
    assert runner.look() == {"reserved": 1, "kept": 1}
    later = authority.submit(cpus=1000)
    assert authority.starts("a") == []
    authority.end(running)
    assert authority.starts("a") == [head]
    assert authority.allocated("a") == {"cpus": 2000, "slots": 1}
    assert authority.waits(later)


def test_reserved_head_starts_by_whichever_alternative_fits_first(authority: Authority) -> None:
    runner = Runner(authority, AT_ONCE)
    authority.worker("a", cpus=1000, gpus=1)
    authority.worker("b", cpus=2000)
    on_gpu = authority.submit(cpus=1000, gpus=1)
    assert authority.starts("a") == [on_gpu]
    running = authority.submit(cpus=1000)
    assert authority.starts("b") == [running]
    head = authority.submit(cpus=1000, gpus=1, terms=GPU_OR_CPUS)
    runner.look()
    assert runner.reserved() == ["a"]
    authority.end(running)
    assert authority.starts("b") == [head]
    assert authority.allocated("b") == {"cpus": 2000, "slots": 1}
    runner.look()
    assert runner.reserved() == []


def test_job_passes_a_reserved_worker_by_a_later_alternative(authority: Authority) -> None:
    runner = Runner(authority, AT_ONCE)
    authority.worker("a", cpus=4000, gpus=2)
    running = authority.submit(cpus=2000)
    assert authority.starts("a") == [running]
    wide = authority.submit(cpus=3000, gpus=2)
    assert runner.look() == {"reserved": 1, "kept": 1}
    # Beside the wide job one CPU is left, and no GPU.
    requests = [Request.of({"cpus": 500, "gpus": 1}), Request.of({"cpus": 1000})]
    passes = authority.submit(cpus=500, gpus=1, terms=alternatives_term(requests))
    waits = authority.submit(cpus=500, gpus=1, terms=alternatives_term(requests))
    assert authority.starts("a") == [passes]
    assert authority.allocated("a") == {"cpus": 3000, "slots": 2}
    runner.look()
    authority.end(running)
    assert authority.starts("a") == [wide]
    assert authority.waits(waits)


@pytest.mark.parametrize("cpus", [1500, 2000])
def test_head_reserves_by_an_alternative_that_its_quota_allows(authority: Authority, cpus: int) -> None:
    runner = Runner(authority, AT_ONCE)
    set_tenant(authority.stores, "physics", {"quota": {"gpus": 1}})
    authority.worker("a", cpus=cpus, gpus=2)
    theirs = authority.submit(cpus=cpus - 1000, gpus=1, terms=",$physics")
    assert authority.starts("a") == [theirs]
    authority.worker("b", cpus=2000)
    running = authority.submit(cpus=1500)
    assert authority.starts("b") == [running]
    # There is room for its first alternative, beyond the quota.
    head = authority.submit(cpus=1000, gpus=1, terms=f"{GPU_OR_CPUS},$physics")
    assert authority.starts("a") == []
    runner.look()
    (worker,) = runner.reserved()
    assert worker == ("b" if cpus == 1500 else "a")
    authority.end(running if worker == "b" else theirs)
    assert authority.starts(worker) == [head]
    # The end of their own job leaves room below the quota.
    gpu, wide = {"cpus": 1000, "gpus": 1, "slots": 1}, {"cpus": 2000, "slots": 1}
    assert authority.allocated(worker) == (wide if worker == "b" else gpu)
