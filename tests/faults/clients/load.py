"""The load of a chaos run: wide and narrow jobs of tenants, with limits, rates by key, expected times and places."""

from __future__ import annotations

import random
import threading
import time
from typing import Any, Final

from celery_capacity.routing.errors import NotAccepted, OutcomeUnknown
from tests.faults.breaking.faults import World
from tests.faults.plan import LABEL, WORKERS
from tests.fixtures.jobs.submitting import Submitter

#: Seconds that a body takes, and CPUs that it asks for.
BODIES: Final = (0.01, 0.02, 0.05, 0.1, 0.2)
CPUS: Final = (0.5, 1.0, 1.0, 2.0)
#: Seconds between two looks at the processes, and after a submission that was refused.
LOOK_EVERY: Final = 0.1
#: Tenants of the jobs in turn; None: the default tenant.
TENANTS: Final = ("physics", "biology", None)
#: Quotas of tenants, as `tenant set` takes them: below the CPUs of all workers, above what the jobs need on average.
QUOTAS: Final = {"physics": "cpus=6", "biology": "cpus=5"}
#: Keys that have limits, and the jobs of a key that may run at once.
KEYS: Final = ("customer:1", "customer:2", "customer:3")
AT_ONCE: Final = 2
#: Every so many jobs one asks for all CPUs of the largest worker. Others would pass it for ever without reservations.
WIDE_EVERY: Final = 23
#: Rate of the key `paced`, which is above that of its jobs.
PACE: Final = "20/s"


def options_of(number: int, seconds: float) -> dict[str, Any]:
    """Return the options of a job by its number, so that all of them meet each other.

    A third of the jobs say how long they run, some of them wrongly. Two thirds have a tenant, a quarter a limit by key,
    a tenth a rate by key, and a seventh a label of the workers that may run them. A few are wide.
    """
    options: dict[str, Any] = {}
    if number % WIDE_EVERY == 0:
        options["cpus"] = max(cpus for _, cpus, _, _ in WORKERS)
    if number % 3 == 0:
        options["lasts"] = max(seconds, 0.01) * (1 + number % 2)
    if (tenant := TENANTS[number // 2 % len(TENANTS)]) is not None:
        options["tenant"] = tenant
    if number % 4 == 0:
        options["limit"] = {KEYS[number // 4 % len(KEYS)]: AT_ONCE}
    if number % 10 == 0:
        options["rate"] = {"paced": PACE}
    if number % 7 == 0:
        side = ("left", "right")[number // 7 % 2]
        options["where"] = {LABEL: side}
        options["workers"] = [worker for worker, _, _, label in WORKERS if label == side]
    return options


class Load:
    """A thread that submits the jobs of a run, evenly over its time.

    A refused job is sent later under another id.
    """

    def __init__(self, world: World, submitter: Submitter, jobs: int, seconds: float, seed: int) -> None:
        self._world = world
        self._submitter = submitter
        self._jobs = jobs
        self._seconds = seconds
        self._seed = seed
        self.refused = 0
        self.unsure = 0
        self.error: BaseException | None = None
        self._give_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def finish(self, within: float) -> None:
        self._thread.join(within)
        self._give_up.set()
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        chance, oracle = random.Random(self._seed), self._world.oracle
        began = time.monotonic()
        for number in range(self._jobs):
            seconds, cpus = chance.choice(BODIES), chance.choice(CPUS)
            self._give_up.wait(began + self._seconds * number / self._jobs - time.monotonic())
            while not self._give_up.is_set():
                try:
                    oracle.send(self._submitter, seconds=seconds, **{"cpus": cpus, **options_of(number, seconds)})
                    break
                except NotAccepted:
                    self.refused += 1
                except OutcomeUnknown:
                    self.unsure += 1
                    break
                except BaseException as error:
                    self.error = error
                    return
                self._give_up.wait(LOOK_EVERY)
