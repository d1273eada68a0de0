"""What a way can be asked, and the cluster that all of them are asked about."""

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
    """`workers` of 64 CPUs, half of which are taken: the workers with the lowest numbers are full. `rows`: jobs in the
    table, where a way has one; all that do not run have ended."""

    workers: int
    rows: int = 10_000

    @property
    def names(self) -> list[str]:
        return [f"w{number:04}" for number in range(self.workers)]

    @property
    def running(self) -> int:
        """Jobs that run: half of what fits."""
        return self.workers * FIT // 2

    @property
    def held(self) -> dict[str, int]:
        """CPUs taken on each worker."""
        return {name: ASKED * self.jobs_on(number) for number, name in enumerate(self.names)}

    def jobs_on(self, number: int) -> int:
        """How many of the running jobs the worker of this number has."""
        return max(0, min(FIT, self.running - number * FIT))


@dataclass(frozen=True)
class Held:
    """An admitted job. `token`: what the way needs beside the worker to give it back."""

    worker: str
    token: str = ""


class Way(Protocol):
    """One way to know what is free. Amounts are whole CPUs; a handle is used by one thread."""

    def load(self, cluster: Cluster) -> None:
        """Brings the cluster about: workers, and the jobs that run on them."""

    def apart(self) -> Way:
        """Another handle on the same state, with connections of its own."""

    def taken(self) -> int:
        """CPUs taken in all."""

    def free(self) -> Mapping[str, int]:
        """CPUs free on each worker that is counted."""

    def admit(self) -> Held | None:
        """Admits one job to the worker with the fewest free CPUs that has room; None where none has."""

    def release(self, held: Held) -> None:
        """Gives back what an admitted job holds."""

    def beat(self, worker: str) -> None:
        """What a live worker does from time to time. Where the way has no heartbeat, nothing."""

    def watch(self) -> None:
        """What the way itself does from time to time about workers that say nothing."""

    def empty(self) -> None:
        """Its quick store forgets everything. (A file is the one under version control again.)"""

    def recover(self) -> int:
        """What the way does by itself when it finds that store empty; the jobs that it admits meanwhile."""

    def close(self) -> None:
        """Ends its connections."""
