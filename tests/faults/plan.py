"""Which faults a run of chaos has, and when: all of it chosen from the seed before anything runs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

#: Seconds between two moments at which something breaks.
EVERY: Final = (4.0, 8.0)
#: Part of the moments at which two things break at once.
DOUBLE: Final = 1 / 3
#: Seconds from the start in which nothing breaks, and part of the whole at its end: what broke last is to heal.
QUIET: Final = 2.0
REST_PART: Final = 0.05
#: The workers of a run: name, CPUs, pool.
WORKERS: Final = (("a", 4, "prefork"), ("b", 4, "threads"), ("c", 2, "prefork"), ("d", 2, "threads"))
#: The part of the platform that stands for any of the workers.
A_WORKER: Final = "worker"


@dataclass(frozen=True, slots=True)
class Kind:
    """A fault: what it touches (no two faults touch one thing at once), and for how many seconds."""

    name: str
    touches: str
    seconds: tuple[float, float] = (0.0, 0.0)
    #: The pool that a worker must have for it; '' for any.
    pool: str = ""


#: Durations are a tenth of those in the table of faults.
KINDS: Final = (
    Kind("kill a child", A_WORKER, pool="prefork"),
    Kind("kill a worker's main process", A_WORKER, (0.1, 3.0)),
    Kind("kill a worker with all its processes", A_WORKER, (0.1, 9.0)),
    Kind("TERM to a worker", A_WORKER, (0.1, 3.0)),
    Kind("QUIT to a worker", A_WORKER, (0.1, 3.0)),
    Kind("stop a worker's main process", A_WORKER, (1.0, 9.0)),
    Kind("stop a worker with all its processes", A_WORKER, (1.0, 9.0)),
    Kind("start a worker's twin", A_WORKER, (3.0, 3.0)),
    Kind("kill beat", "beat", (1.0, 3.0)),
    Kind("kill Redis, back empty", "redis", (0.5, 2.0)),
    Kind("kill Redis, back from an old dump", "redis", (0.5, 2.0)),
    Kind("empty Redis", "redis"),
    Kind("delete half of the keys", "redis"),
    Kind("Redis is read-only", "redis", (0.5, 1.5)),
    Kind("Redis is full", "redis", (0.5, 1.5)),
    Kind("Redis is slow by 2 s", "redis", (1.0, 3.0)),
    Kind("Redis is half open", "redis", (1.0, 2.0)),
    Kind("drop all connections to Redis", "redis"),
    Kind("kill Postgres", "postgres", (0.5, 2.0)),
    Kind("lock the table of jobs", "postgres", (0.5, 1.5)),
    Kind("use up the connections of Postgres", "postgres", (0.5, 1.5)),
    Kind("Postgres is half open", "postgres", (1.0, 2.0)),
    Kind("drop all connections to Postgres", "postgres"),
    Kind("push garbage", "messages"),
    Kind("push messages twice", "messages"),
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a run. `at` and `until`: seconds from its start. `chance`: seeds what it chooses itself."""

    kind: str
    at: float
    until: float
    worker: str
    chance: int

    def __str__(self) -> str:
        target = f" {self.worker}" if self.worker else ""
        lasts = f" for {self.until - self.at:.1f} s" if self.until > self.at else ""
        return f"{self.at:6.1f} s: {self.kind}{target}{lasts}"


def plan(seed: int, seconds: float) -> list[Fault]:
    """The faults of a run, in their order; the same for the same seed and duration."""
    return list(_plan(random.Random(seed), seconds))


def _plan(chance: random.Random, seconds: float) -> Iterator[Fault]:
    busy: dict[str, float] = {}
    at, end = QUIET, seconds * (1 - REST_PART)
    kinds: list[Kind] = []
    while at < end:
        for _ in range(2 if chance.random() < DOUBLE else 1):
            beat = at < seconds / 2
            kinds = [kind for kind in kinds if beat or kind.touches != "beat"]
            if not kinds:
                # Each kind comes once before any comes again.
                kinds = chance.sample(KINDS, len(KINDS))
            chosen = _possible(kinds, busy, at, end, beat)
            if chosen is None:
                continue
            kind, targets = chosen
            kinds.remove(kind)
            target = chance.choice(targets)
            until = min(at + chance.uniform(*kind.seconds), end)
            busy[target] = until + 1.0
            yield Fault(kind.name, at, until, target if kind.touches == A_WORKER else "", chance.randrange(2**32))
        at += chance.uniform(*EVERY)


def _possible(
    kinds: Sequence[Kind], busy: dict[str, float], at: float, end: float, beat: bool
) -> tuple[Kind, list[str]] | None:
    """The next kind that something free can have, and what of the platform that is."""
    for kind in kinds:
        if kind.touches == "beat" and not beat:
            continue
        if kind.touches == A_WORKER:
            named = [name for name, _, pool in WORKERS if kind.pool in ("", pool)]
        else:
            named = [kind.touches]
        free = [name for name in named if busy.get(name, 0.0) <= at]
        if free:
            return kind, free
    return None
