"""The choice of faults for a chaos run: the seed determines all faults and times before anything runs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from tests.fixtures.servers.pair import TENTH

#: Seconds between two moments at which something breaks.
EVERY: Final = (4.0, 8.0)
#: Part of the moments at which two things break at once.
DOUBLE: Final = 1 / 3
#: Seconds at the start in which nothing breaks, and part of the run at its end, so that the last faults heal.
QUIET: Final = 2.0
REST_PART: Final = 0.05
#: The workers of a run: name, CPUs, pool, value of their label.
WORKERS: Final = (
    ("a", 4, "prefork", "left"),
    ("b", 4, "threads", "right"),
    ("c", 2, "prefork", "left"),
    ("d", 2, "threads", "right"),
)
#: Key of the label.
LABEL: Final = "side"
#: Placeholder in `touches` for any of the workers.
A_WORKER: Final = "worker"
#: Seconds of a fault that must outlast the tombstone of an ended job, and of a fault that must outlast every lease too:
#: one and a half times each. All intervals are settings, and these constants follow them.
TOMBSTONES: Final = 1.5 * float(TENTH["PLATFORM_TOMBSTONE"])
LEASES: Final = 1.5 * max(
    float(TENTH[f"PLATFORM_{name}"]) for name in ("WORKER_TTL", "LOST_AFTER", "START_TIMEOUT", "TOMBSTONE")
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault: its target and its duration in seconds.

    No two faults touch the same target at once.
    """

    name: str
    touches: str
    seconds: tuple[float, float] = (0.0, 0.0)
    #: Pool that the worker must have; '' for any.
    pool: str = ""
    #: Other targets that no other fault may touch meanwhile.
    also: tuple[str, ...] = ()


#: Durations are a tenth of those in the table of faults. Kinds that must outlast a lease last exactly so long.
KINDS: Final = (
    Kind("kill a child", A_WORKER, pool="prefork"),
    Kind("kill a worker's main process", A_WORKER, (0.1, 3.0)),
    Kind("kill a worker with all its processes", A_WORKER, (0.1, 9.0)),
    Kind("TERM to a worker", A_WORKER, (0.1, 3.0)),
    Kind("QUIT to a worker", A_WORKER, (0.1, 3.0)),
    Kind("stop a worker's main process", A_WORKER, (1.0, LEASES)),
    Kind("stop a worker's main process for longer than each lease", A_WORKER, (LEASES, LEASES)),
    Kind("stop a worker with all its processes", A_WORKER, (1.0, LEASES)),
    Kind("stop a worker with all its processes for longer than each lease", A_WORKER, (LEASES, LEASES)),
    Kind("stop a child for longer than each lease", A_WORKER, (LEASES, LEASES), pool="prefork"),
    Kind("kill a worker's largest process, as if out of memory", A_WORKER, (0.1, 3.0)),
    Kind("set a worker's clock an hour forward", A_WORKER, (3.0, LEASES)),
    Kind("set a worker's clock an hour back", A_WORKER, (3.0, LEASES)),
    Kind("heartbeats in pairs", A_WORKER, (3.0, LEASES)),
    Kind("start a worker's twin", A_WORKER, (3.0, 3.0)),
    Kind("start a worker's twin on another boot", A_WORKER, (3.0, 3.0)),
    Kind("kill beat", "beat", (1.0, 3.0)),
    Kind("stop beat for longer than each lease", "beat", (LEASES, LEASES)),
    Kind("stop a client for longer than each lease", "client", (LEASES, LEASES)),
    Kind("kill Redis, back empty", "redis", (0.5, 2.0)),
    Kind("kill Redis, back from an old dump", "redis", (0.5, 2.0)),
    Kind("empty Redis", "redis"),
    Kind("delete half of the keys", "redis"),
    Kind("Redis is read-only", "redis", (0.5, 1.5)),
    Kind("Redis is full", "redis", (0.5, 1.5)),
    Kind("Redis is slow by 2 s", "redis", (1.0, 3.0)),
    Kind("Redis is half open", "redis", (1.0, 2.0)),
    Kind("drop all connections to Redis", "redis"),
    Kind("Redis is frozen for longer than each lease", "redis", (LEASES, LEASES)),
    Kind("Redis evicts", "redis", (0.5, 1.5)),
    Kind("Redis fails over", "redis", (1.0, 3.0)),
    Kind(
        "empty Redis, and stop who opens the epoch",
        "redis",
        (LEASES, LEASES),
        also=tuple(worker[0] for worker in WORKERS),
    ),
    Kind("kill Postgres", "postgres", (0.5, 2.0)),
    Kind("lock the table of jobs", "postgres", (0.5, 1.5)),
    Kind("use up the connections of Postgres", "postgres", (0.5, 1.5)),
    Kind("Postgres is half open", "postgres", (1.0, 2.0)),
    Kind("drop all connections to Postgres", "postgres"),
    Kind("Postgres is away for longer than a tombstone", "postgres", (TOMBSTONES, TOMBSTONES)),
    Kind("Postgres is read-only", "postgres", (TOMBSTONES, TOMBSTONES)),
    Kind("lock the table of jobs for who writes", "postgres", (TOMBSTONES, TOMBSTONES)),
    Kind("Postgres is stalled", "postgres", (TOMBSTONES, TOMBSTONES)),
    Kind("the disk is full", "postgres", (TOMBSTONES, TOMBSTONES), also=("redis",)),
    Kind("push garbage", "messages"),
    Kind("push messages twice", "messages"),
)


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of a run.

    `at` and `until`: seconds from the start of the run. `chance`: seed of the fault's own choices.
    """

    kind: str
    at: float
    until: float
    worker: str
    chance: int

    def __str__(self) -> str:
        target = f" {self.worker}" if self.worker else ""
        lasts = f" for {self.until - self.at:.1f} s" if self.until > self.at else ""
        return f"{self.at:6.1f} s: {self.kind}{target}{lasts}"


def matching(wanted: str) -> list[str]:
    """Return the kind of this name, or else all kinds whose names have all of its words, such as `stalled-postgres`.

    Raises `ValueError` if there is none.
    """
    if any(kind.name == wanted for kind in KINDS):
        return [wanted]
    words = wanted.lower().replace("-", " ").split()
    names = [kind.name for kind in KINDS if all(word in kind.name.lower().replace("-", " ") for word in words)]
    if not names:
        raise ValueError(f"there is no kind of fault with these words: {wanted}")
    return names


def plan(seed: int, seconds: float, only: Sequence[str] = ()) -> list[Fault]:
    """Return the faults of a run, in their order.

    The faults are equal for equal seeds, durations and kinds. `only`: names of kinds; all kinds if it is empty.
    """
    chosen = [kind for kind in KINDS if kind.name in only] if only else KINDS
    return list(_plan(random.Random(seed), seconds, chosen))


def _plan(chance: random.Random, seconds: float, chosen: Sequence[Kind]) -> Iterator[Fault]:
    busy: dict[str, float] = {}
    at, end = QUIET, seconds * (1 - REST_PART)
    kinds: list[Kind] = []
    while at < end:
        for _ in range(2 if chance.random() < DOUBLE else 1):
            beat = at < seconds / 2
            kinds = [kind for kind in kinds if beat or kind.touches != "beat"]
            if not kinds:
                # Each kind comes once before any kind comes again.
                kinds = chance.sample(chosen, len(chosen))
            possible = _possible(kinds, busy, at, beat)
            if possible is None:
                continue
            kind, targets = possible
            kinds.remove(kind)
            target = chance.choice(targets)
            until = min(at + chance.uniform(*kind.seconds), end)
            busy |= dict.fromkeys((target, *kind.also), until + 1.0)
            yield Fault(kind.name, at, until, target if kind.touches == A_WORKER else "", chance.randrange(2**32))
        at += chance.uniform(*EVERY)


def _possible(kinds: Sequence[Kind], busy: dict[str, float], at: float, beat: bool) -> tuple[Kind, list[str]] | None:
    """Return the next kind that has a free target, and its free targets."""
    for kind in kinds:
        if (kind.touches == "beat" and not beat) or any(busy.get(name, 0.0) > at for name in kind.also):
            continue
        if kind.touches == A_WORKER:
            named = [name for name, _, pool, _ in WORKERS if kind.pool in ("", pool)]
        else:
            named = [kind.touches]
        free = [name for name in named if busy.get(name, 0.0) <= at]
        if free:
            return kind, free
    return None
