"""The questions that each way answers, and the cluster that all ways are asked about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

#: CPUs of each worker.
CPUS = 64
#: CPUs of each job.
ASKED = 8
#: Jobs that one worker has room for.
FIT = CPUS // ASKED


@dataclass(frozen=True)
class Cluster:
    """`workers` of 64 CPUs, half of which are taken: the workers with the lowest numbers are full.

    `rows`: jobs in the table, where a way has one. All jobs that do not run have ended.
    """

    workers: int
    rows: int = 10_000

    @property
    def names(self) -> list[str]:
        return [f"w{number:04}" for number in range(self.workers)]

    @property
    def running(self) -> int:
        """Return the number of running jobs: half of those that fit."""
        return self.workers * FIT // 2

    @property
    def held(self) -> dict[str, int]:
        """Return the CPUs taken on each worker."""
        return {name: ASKED * self.jobs_on(number) for number, name in enumerate(self.names)}

    def jobs_on(self, number: int) -> int:
        """Return the number of running jobs on the worker of this number."""
        return max(0, min(FIT, self.running - number * FIT))


@dataclass(frozen=True)
class Held:
    """An admitted job. `token`: the value, beside the worker, that the way needs for its release."""

    worker: str
    token: str = ""


class Way(Protocol):
    """A way to know the free CPUs. Amounts are whole CPUs; a handle is used by one thread."""

    def load(self, cluster: Cluster) -> None:
        """Create the cluster: workers, and the jobs that run on them."""

    def apart(self) -> Way:
        """Return another handle on the same state, with connections of its own."""

    def taken(self) -> int:
        """Return the CPUs taken in all."""

    def free(self) -> Mapping[str, int]:
        """Return the free CPUs of each worker that is counted."""

    def admit(self) -> Held | None:
        """Admit one job to the worker with the fewest free CPUs that has room. Return None if none has."""

    def release(self, held: Held) -> None:
        """Release the CPUs of an admitted job."""

    def beat(self, worker: str) -> None:
        """Do the periodic work of a live worker. Do nothing where the way has no heartbeat."""

    def watch(self) -> None:
        """Do the way's own periodic work about silent workers."""

    def empty(self) -> None:
        """Empty the way's quick store. A file becomes the version under version control again."""

    def recover(self) -> int:
        """Do the way's own work after it finds that store empty. Return the number of jobs admitted meanwhile."""

    def close(self) -> None:
        """Close the way's connections."""
