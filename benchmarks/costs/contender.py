"""A contender: a side of a checkout, on servers of its own, with a submitter and a worker."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from benchmarks.costs.reading import Meter, family, watched
from benchmarks.costs.system_calls import counted
from benchmarks.processes import Side, Submitter, Worker, submitter
from benchmarks.servers import Pair, pair_of, private_pair

#: Seconds after the last result in which both sides write what they still have: outcomes, acknowledgements.
SETTLING = 0.2

#: Costs of one job by name, such as `cpu_us.worker`.
PerJob = dict[str, float]


@dataclass
class Contender:
    """The processes of a side, and the costs of a job in each round by figure.

    `name` is the side's, or `beside` for our side of another checkout. While `counting` is set, system calls are
    counted in place of everything else, because counting them costs CPU time.
    """

    name: str
    side: Side
    pair: Pair
    sender: Submitter
    database: Any
    worker: Worker | None = None
    counting: bool = False
    rounds: dict[str, list[PerJob]] = field(default_factory=dict)
    calls: dict[str, PerJob] = field(default_factory=dict)

    @contextmanager
    def metered(self, figure: str, jobs: int, *, settle: bool = False) -> Iterator[None]:
        """Add the costs of a job in the block to the figure. `settle` includes what follows the last result."""
        assert self.worker is not None
        processes = {
            "submitter": self.sender.pid,
            "worker": self.worker.pid,
            "Redis": self.pair.redis_pid,
            "Postgres": self.pair.postgres_pid,
        }
        if self.counting:
            with counted({role: family(pid) for role, pid in processes.items()}) as counts:
                yield
                time.sleep(SETTLING if settle else 0)  # a pause of fixed length, not a wait for an event
            self.calls[figure] = {f"system_calls.{role}": count / jobs for role, count in counts.items()}
            return
        with redis.Redis.from_url(self.pair.redis_url) as client:
            meter = Meter(client, processes.items(), self.database)
            before = meter.read()
            yield
            time.sleep(SETTLING if settle else 0)
            self.rounds.setdefault(figure, []).append(meter.costs(jobs, before).per_job())

    def medians(self) -> dict[str, PerJob]:
        """Return the median of the rounds, by figure and name."""
        return {figure: median(rounds) | self.calls.get(figure, {}) for figure, rounds in self.rounds.items()}


def median(rounds: Sequence[Mapping[str, float]]) -> PerJob:
    """Return the median of each cost over the rounds."""
    return {name: statistics.median(round_[name] for round_ in rounds) for name in rounds[0]}


@contextmanager
def contender(name: str, side: Side, checkout: Path | None = None) -> Iterator[Contender]:
    """Start the servers and the submitter of a side. `checkout` is another one whose code is measured."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        servers = private_pair(Path(folder)) if checkout is None else pair_of(checkout, Path(folder))
        with servers as pair, submitter(side, pair) as sender, watched(pair.database_url) as database:
            yield Contender(name, side, pair, sender, database)
