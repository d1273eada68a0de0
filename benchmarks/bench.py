"""Tools of a figure: the number of rounds, servers of its own with both sides on them, progress."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import redis

from benchmarks.costs.reading import Costs, Meter, watched
from benchmarks.processes import SIDES, Side, Submitter, Worker, submitter, worker
from benchmarks.rounds import in_turn
from benchmarks.servers import Pair, private_pair, sync_ms, versions

V = TypeVar("V")


@dataclass(frozen=True)
class Contest:
    """Both sides on one pair of servers: a submitter each, and on request a worker each."""

    pair: Pair
    rounds: int
    senders: dict[Side, Submitter]
    workers: dict[Side, Worker]
    #: Costs by their heading in the profile: a side, and the phase where a figure has several.
    costs: dict[str, Costs] = field(default_factory=dict)

    @contextmanager
    def metered(
        self, side: Side, jobs: int, *, phase: str = "", worker: Worker | None = None, senders: Sequence[Submitter] = ()
    ) -> Iterator[None]:
        """Add the block's costs to the costs of a side, and of a phase where the figure has several.

        `worker` and `senders` name the processes when they are not the contest's own. A contest may have no worker.
        """
        receiver = worker or self.workers.get(side)
        processes = [
            *(("submitter", sender.pid) for sender in senders or (self.senders[side],)),
            *([("worker", receiver.pid)] if receiver is not None else []),
            ("Redis", self.pair.redis_pid),
            ("Postgres", self.pair.postgres_pid),
        ]
        with redis.Redis.from_url(self.pair.redis_url) as client, watched(self.pair.database_url) as database:
            meter = Meter(client, processes, database)
            before = meter.read()
            yield
            costs = self.costs.setdefault(", ".join(filter(None, (side, phase))), Costs())
            costs.add(meter.read().since(before), jobs)

    def in_turn(self, measure: Callable[[Side], V], *, most: int | None = None) -> tuple[list[V], list[V]]:
        """Return one value of `measure` per round and side, measured in turn: ours, plain, ours, plain.

        `most` limits the rounds of a long measurement.
        """
        return in_turn(min(self.rounds, most or self.rounds), lambda: measure("ours"), lambda: measure("plain"))

    def warm_up(self, call: str, **arguments: Any) -> None:
        """Make a call on each side that does not count: it opens connections, loads scripts and fills pools."""
        for sender in self.senders.values():
            sender.call(call, **arguments)


class Bench:
    """A run of the benchmarks, with `rounds` rounds per figure."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        #: Lines that explain the newest figure.
        self.profile: list[str] = []
        #: Name and version of each measured server, and the speed of its disk.
        self.versions: dict[str, str] = {}
        self._measured: dict[Callable[..., Any], tuple[Any, list[str]]] = {}

    def say(self, text: str) -> None:
        """Print progress on standard error, for the waiting user."""
        print(text, file=sys.stderr, flush=True)

    def once(self, measure: Callable[[Bench], V]) -> V:
        """Return the result of `measure`, measured once, for figures that are two views of one measurement."""
        if measure not in self._measured:
            result = measure(self)
            self._measured[measure] = result, self.profile
        value: V
        value, self.profile = self._measured[measure]
        return value

    @contextmanager
    def pair(self) -> Iterator[Pair]:
        """Start fresh servers in a temporary folder, so that no figure meets the remains of another."""
        with tempfile.TemporaryDirectory(prefix="bench-") as folder, private_pair(Path(folder)) as pair:
            if not self.versions:
                self.versions = {**versions(pair), "one sync of the disk": f"{sync_ms(Path(folder)):.2f} ms"}
            yield pair

    @contextmanager
    def contest(
        self, *, pool: str = "prefork", concurrency: int = 2, cpus: int | None = None, workers: bool = True
    ) -> Iterator[Contest]:
        """Start fresh servers, and on them one submitter and one worker of each side.

        `concurrency` is the number of slots of either worker. Ours publishes as many CPUs unless `cpus` says more.
        """
        with self.pair() as pair, ExitStack() as stack:
            running: dict[Side, Worker] = {}
            for side in SIDES if workers else ():
                started = worker(side, pair, pool=pool, concurrency=concurrency, cpus=cpus or concurrency)
                running[side] = stack.enter_context(started)
            senders = {side: stack.enter_context(submitter(side, pair)) for side in SIDES}
            contest = Contest(pair, self.rounds, senders, running)
            yield contest
            self.profile = [line for heading, costs in contest.costs.items() for line in costs.lines(heading)]
