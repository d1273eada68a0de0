"""Seconds until a change shows: a job that can never run, a worker that makes it possible, a new rule of a tenant.

The platform polls nothing to show a job that can never run: each reading judges the waiting requests. The rule of a
tenant reaches the ledger from the program that sets it, and by a duty each second where that program dies.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Engine

from benchmarks.bench import Bench
from benchmarks.processes import Submitter, submitter, worker
from benchmarks.rounds import percentile
from benchmarks.servers import Pair
from benchmarks.size.scale import Scale
from benchmarks.size.stock import engine_of, environment
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.inspect.explain import explain
from celery_capacity.routing.inspect.overview import from_ledger
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.policy.tenants import Rule
from celery_capacity.routing.recovery import controls as copies
from celery_capacity.routing.store import controls

#: Tries of each figure in a round; those that start a worker are fewer.
TRIES: Final = 20
STARTS: Final = 3
#: CPUs of the workers that are there, and of the one that comes.
CPUS: Final = 2
LARGE: Final = 10_000
#: Seconds to wait for a change, and between two looks.
PATIENCE: Final = 60.0
LOOK_SECONDS: Final = 0.002


@dataclass
class Seen:
    """A platform with one worker, a program that submits, and both stores."""

    pair: Pair
    sender: Submitter
    ledger: Ledger
    engine: Engine

    def submit(self, task: str, *arguments: Any, **options: Any) -> tuple[float, str]:
        """Submit a job, and return when that began, in seconds of the monotonic clock, and the job's id."""
        began, job = self.sender.call("timed", task=task, arguments=arguments, options=options)
        return began, job

    def started(self) -> list[float]:
        """Wait for the submitted jobs, and return the times of their starts."""
        return [value[0] for value in self.sender.call("gather")]

    def is_infeasible_first(self) -> bool:
        """Return True if `cluster --json` has a request that no worker could ever hold as the first one."""
        backlog = from_ledger(self.ledger.client).backlog
        return bool(backlog) and backlog[0].blocked is Reason.TOO_LARGE

    def is_explained(self, job: str) -> bool:
        """Return True if `job ID` has the reason that no worker could ever hold a job."""
        with self.engine.connect() as connection:
            explanation = explain(self.ledger.client, connection, job)
        return explanation is not None and explanation.why is Reason.TOO_LARGE


@contextmanager
def platform(bench: Bench, name: str) -> Iterator[Seen]:
    """Start servers, a worker and a submitter. `name`: of the worker."""
    with (
        bench.pair() as pair,
        worker("ours", pair, concurrency=CPUS, cpus=CPUS, name=name),
        submitter("ours", pair) as sender,
    ):
        engine, ledger = engine_of(pair.database_url), Ledger(Settings.from_environ(environment(pair)))
        try:
            with engine.connect() as connection:
                ledger.epoch = read_authority(connection).epoch
            yield Seen(pair, sender, ledger, engine)
        finally:
            ledger.client.close()
            engine.dispose()


def seen(bench: Bench, _: Scale) -> Mapping[str, float]:
    """Time when changes show, on an idle platform."""
    with platform(bench, "small") as here:
        shown, cleared = _infeasible(here)
        copied, by_duty = _rules(here)
    for name, taken in (("infeasible", shown), ("cleared", cleared), ("rule", copied)):
        bench.say(f"  {name}: {', '.join(f'{seconds:.3f}' for seconds in taken)}")
    return {
        "seen_infeasible_s": percentile(shown, 0.5),
        "seen_infeasible_max_s": max(shown),
        "seen_cleared_s": percentile(cleared, 0.5),
        "seen_cleared_max_s": max(cleared),
        "seen_tenant_s": percentile(copied, 0.5),
        "seen_tenant_max_s": max(copied),
        "seen_tenant_duty_s": percentile(by_duty, 0.5),
        "seen_tenant_duty_max_s": max(by_duty),
    }


def _infeasible(here: Seen) -> tuple[list[float], list[float]]:
    """Return the seconds until a job that can never run is shown, and until a worker that comes has cleared that."""
    shown, cleared = list[float](), list[float]()
    for number in range(TRIES):
        began, job = here.submit("bench.noop", cpus=CPUS + 1)
        _until(lambda job=job: here.is_infeasible_first() and here.is_explained(job))  # type: ignore[misc]
        shown.append(time.monotonic() - began)
        if number < TRIES - STARTS:
            _cancel(here)
        else:
            cleared.append(_cleared(here))
        here.sender.call("forget")
    return shown, cleared


def _cancel(here: Seen) -> None:
    here.sender.call("revoke")
    _until(lambda: not here.is_infeasible_first())


def _cleared(here: Seen) -> float:
    """Start a large worker, and return the seconds from its registration until nothing is infeasible."""
    registered = list[float]()

    def watch() -> None:
        _until(lambda: here.ledger.client.zscore(keys.LEASES, "large") is not None)
        registered.append(time.monotonic())
        _until(lambda: not here.is_infeasible_first())
        registered.append(time.monotonic())

    watching = threading.Thread(target=watch)
    watching.start()
    with worker("ours", here.pair, concurrency=CPUS, cpus=LARGE, name="large"):
        watching.join()
    _until(lambda: here.ledger.client.zscore(keys.LEASES, "large") is None)
    return registered[1] - registered[0]


def _rules(here: Seen) -> tuple[list[float], list[float]]:
    """Return seconds until a job starts that a new rule lets start: set by a program, and by one that dies."""
    copied, by_duty = list[float](), list[float]()
    for taken, does_copy in ((copied, True), (by_duty, False)):
        for _ in range(TRIES):
            _set_quota(here, 0)
            copies.level(here.engine, here.ledger)
            here.submit("bench.stamp", tenant="physics")
            began = time.monotonic()
            _set_quota(here, CPUS)
            if does_copy:
                copies.level(here.engine, here.ledger)
            taken.append(here.started()[0] - began)
    return copied, by_duty


def _set_quota(here: Seen, cpus: int) -> None:
    """Make the rule durable, as the first step of `tenant set`. The second one is `copies.level`."""
    with here.engine.execution_options(isolation_level="READ COMMITTED").begin() as connection:
        controls.lock(connection)
        controls.set_tenant(connection, "physics", Rule(quota={"cpus": cpus * 1000}), "bench")


def _until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not is_so():
        if time.monotonic() > end:
            raise RuntimeError("nothing changed within a minute")
        time.sleep(LOOK_SECONDS)


# -- a flood

#: Waiting jobs of one tenant; with `--scale 10` a million. Without a flood it has few, so that both clusters are full.
#: Redis has the first 10,000 of each shape either way.
FLOOD: Final = 100_000
FEW: Final = 100
#: Seconds of each of its jobs. On two slots one ends every tenth of a second.
HOLD: Final = 0.2
#: Other tenants, each with a first job.
OTHERS: Final = 20


def flooded(bench: Bench, scale: Scale) -> Mapping[str, float]:
    """Time the first starts of other tenants behind the flood of one, and the same on a full cluster without it."""
    waits = {}
    for jobs in (FEW, max(FEW, scale.of(FLOOD))):
        with platform(bench, f"worker-{jobs}") as here:
            begin = time.monotonic()
            here.sender.call("flood", task="bench.hold", arguments=[HOLD], count=jobs, options={"tenant": "flood"})
            bench.say(f"  {jobs} jobs in {time.monotonic() - begin:.1f} s")
            waits[jobs] = _first_starts(here)
            bench.say(f"  {', '.join(f'{seconds:.3f}' for seconds in waits[jobs])}")
    without, behind = waits.values()
    return {
        "flood_first_start_s": percentile(behind, 0.5),
        "flood_first_start_max_s": max(behind),
        "flood_ratio": percentile(behind, 0.5) / percentile(without, 0.5),
    }


def _first_starts(here: Seen) -> list[float]:
    """Return the seconds from the submission of the first job of each other tenant to its start."""
    waits, chance = [], random.Random(OTHERS)
    for number in range(OTHERS):
        # Each start is an end of a job. Else each submission would follow such an end.
        time.sleep(chance.random() * HOLD)
        began, _ = here.submit("bench.stamp", tenant=f"other-{number}")
        waits.append(here.started()[0] - began)
    return waits
