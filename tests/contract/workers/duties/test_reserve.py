"""The duty that makes reservations counts missed times and kept workers, whichever store decides."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from celery_capacity.routing.fallback import reservations as without_ledger
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.expected import RunTime
from celery_capacity.routing.recovery import reservations as with_ledger
from celery_capacity.workers.duties import reserve
from tests.contract.test_authorities_reservations import Passed
from tests.fixtures.stores.authorities import Authority
from tests.fixtures.waiting import until

#: Run times in milliseconds: over within the test, and not.
SHORT, LONG = RunTime(100, 100), RunTime(2**20, 2**20)


def duty(cluster: Authority) -> dict[str, int]:
    run = reserve.run_once if cluster.name == "ledger" else reserve.without_ledger
    return run(cluster.app, cluster.stores)


def counters(cluster: Authority) -> Counter[str]:
    """Return the counts in the ledger, with those that go there with the next call."""
    counts = cluster.stores.ledger.tally.take()
    client: Any = cluster.stage.redis
    for name, number in client.hgetall(keys.COUNTERS).items():
        counts[name.decode()] += int(number)
    return counts


def test_each_missed_time_of_a_reservation_is_counted_once(authority: Authority) -> None:
    authority.worker("a", cpus=4000)
    running = authority.submit(cpus=1000, run_time=SHORT)
    assert authority.starts("a") == [running]
    wide = authority.submit(cpus=4000, run_time=LONG)
    assert duty(authority)["reserved"] == 1
    passes: list[int] = []

    def is_late() -> bool:
        passes.append(duty(authority)["overruns"])
        return any(passes)

    until(is_late, "the running job is late")
    # The next time that is reserved may be missed too until then.
    passes.append(duty(authority)["overruns"])
    counts = counters(authority)
    assert (counts["overran"], counts["kept"]) == (sum(passes), 0)
    authority.end(running)
    assert authority.starts("a") == [wide]


def test_kept_worker_is_counted_once(authority: Authority) -> None:
    authority.stores._made["settings"] = replace(authority.stores.settings, reserve_after=0.001)
    ledger = authority.stores.ledger
    reserve._memories[ledger] = with_ledger.Memory(Passed())
    reserve._memories_without[ledger] = without_ledger.Memory(ledger.epoch, Passed())
    authority.worker("a", cpus=4000)
    running = authority.submit(cpus=1000)
    assert authority.starts("a") == [running]
    wide = authority.submit(cpus=4000)
    for _ in range(2):
        duty(authority)
    counts = counters(authority)
    assert (counts["kept"], counts["overran"]) == (1, 0)
    authority.end(running)
    assert authority.starts("a") == [wide]
