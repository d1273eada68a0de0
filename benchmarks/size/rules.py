"""Cost of an admission and its release with the scheduler's rules in use, beside the same books without them.

The rules are switched on and off in turn on one Redis, so that a slow moment of the machine meets both. The cost is
that of the scripts, as Redis counts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Final, Protocol

from benchmarks.bench import Bench
from benchmarks.books import CPUS, REQUEST, Books, books
from benchmarks.rounds import percentile
from benchmarks.size.scale import Scale
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.policy.reservation import Reservation

#: Workers of the two clusters, waiting jobs of the second half, and their shapes.
FEW: Final = 10
MANY: Final = 10_000
WAITING: Final = 1_000_000
SHAPES: Final = 500
#: Admissions and releases of one turn, and turns with and without the rules.
CYCLES: Final = 50
TURNS: Final = 10
#: Milliseconds after which the blocked job is expected to start.
EXPECTED: Final = 600_000
#: Request of a blocked job: no worker ever has room for it.
BLOCKED: Final = f"cpus={CPUS + 1}000,slots=1"


class Rule(Protocol):
    """Rule that the benchmark can switch on: a context in which the ledger keeps it."""

    def __call__(self, opened: Books) -> AbstractContextManager[None]: ...


@contextmanager
def reservations(opened: Books) -> Iterator[None]:
    """Reserve a worker for the first blocked job, as the runner of the duties does with `PLATFORM_BACKFILL_DEPTH=1`."""
    ledger: Any = opened.ledger
    first = int(ledger.client.zscore(keys.SHAPES, BLOCKED))
    reservation = Reservation("w0", BLOCKED, first, ledger.now_ms() + EXPECTED, {}, 0)
    if not ledger.reserve(reservation, {}, ["w0"]):
        raise RuntimeError("the books have changed, so nothing was reserved")
    yield
    ledger.unreserve(BLOCKED, [])


#: Rules that are in use together. Each new rule of the scheduler is added here.
RULES: Final[tuple[Rule, ...]] = (reservations,)


def ruled(bench: Bench, scale: Scale) -> Mapping[str, float]:
    """Measure a cycle with the rules beside one without, for each size of the cluster and of the backlog."""
    figures, slowest = dict[str, float](), list[float]()
    for workers, name in ((FEW, "10"), (max(FEW, scale.of(MANY)), "10000")):
        with bench.pair() as pair, books(pair, workers) as opened:
            opened.fill_backlog(1, 1)
            for waiting, suffix in ((0, ""), (scale.of(WAITING), "_waiting")):
                opened.fill_backlog(waiting, SHAPES)
                bench.say(f"  {workers} workers, {waiting} waiting")
                figures[f"rules_{name}{suffix}"], most = _measured(bench, opened)
                slowest.append(most)
    return figures | {"rules_slowest_ms": max(slowest)}


def _measured(bench: Bench, opened: Books) -> tuple[float, float]:
    """Return the ratio of the costs, and the milliseconds of the slowest script."""
    client: Any = opened.ledger.client
    client.config_set("slowlog-log-slower-than", 1000)
    client.slowlog_reset()
    ratio = _ratio(bench, opened)
    entries = [entry for entry in client.slowlog_get(128) if b"EVALSHA" in entry["command"].upper()]
    # The slow log has only scripts above 1 ms.
    return ratio, max([1.0, *(entry["duration"] / 1000 for entry in entries)])


def _ratio(bench: Bench, opened: Books) -> float:
    """Return the median cost of a cycle with the rules over that without them."""
    plain, ruled_ = list[float](), list[float]()
    for turn in range(2 * TURNS):
        with ExitStack() as stack:
            if turn % 2:
                for rule in RULES:
                    stack.enter_context(rule(opened))
            (ruled_ if turn % 2 else plain).extend(_cycles(opened))
    with_rules, without = percentile(ruled_, 0.5), percentile(plain, 0.5)
    bench.say(f"  {with_rules:.0f} us with the rules, {without:.0f} us without: {with_rules / without:.2f} x")
    return with_rules / without


def _cycles(opened: Books) -> list[float]:
    """Admit and release jobs, and return the microseconds of the scripts of each cycle."""
    client: Any = opened.ledger.client
    taken = []
    for _ in range(CYCLES):
        client.config_resetstat()
        job, place = opened.new_job()
        opened.release(job, opened.ledger.submit(job, REQUEST, place, opened.message))
        taken.append(float(client.info("commandstats")["cmdstat_evalsha"]["usec"]))
    return taken
