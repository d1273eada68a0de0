"""Cost of an admission and its release with the scheduler's rules in use, beside the same books without them.

Two servers have the same workers and as many waiting jobs. On one of them the rules are in use. They take turns, so
that a slow moment of the machine meets both. The cost is that of the scripts, as Redis counts it.

No script knows a limit by key: a job with one waits in Postgres until it may start (routing/insert/key_limits.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Final, Protocol

from benchmarks.bench import Bench
from benchmarks.books import CPUS, REQUEST, Books, books, tenant_name
from benchmarks.rounds import percentile
from benchmarks.size.scale import Scale
from benchmarks.size.server_time import scripts_timed
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.policy.reservation import Reservation
from celery_capacity.routing.policy.tenants import Rule as TenantRule
from celery_capacity.routing.policy.tenants import tenant_term

#: Workers of the two clusters, waiting jobs of the second half, and their shapes.
FEW: Final = 10
MANY: Final = 10_000
WAITING: Final = 1_000_000
SHAPES: Final = 500
#: Tenants that own the shapes and the measured jobs in turn.
TENANTS: Final = 50
#: Admissions and releases of one turn, and turns with and without the rules.
CYCLES: Final = 50
TURNS: Final = 10
#: Milliseconds after which the blocked job is expected to start.
EXPECTED: Final = 600_000
#: Request of a blocked job: no worker ever has room for it.
BLOCKED: Final = f"cpus={CPUS + 1}000,slots=1"


class Rule(Protocol):
    """Rule of the scheduler: a context in which the ledger keeps it."""

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


@contextmanager
def tenants(opened: Books) -> Iterator[None]:
    """Give each tenant a weight, a nominal share and a quota that is not reached, and tell the ledger the capacity."""
    ledger: Any = opened.ledger
    workers = ledger.client.zcard(keys.LEASES)
    rules = {
        ("tenant", tenant_name(number)): TenantRule(1 + number % 3, {"cpus": 1000}, {"cpus": 10**9}).text
        for number in range(TENANTS)
    }
    if not ledger.set_controls(1, rules, last=True):
        raise RuntimeError("the ledger has newer rules of tenants")
    ledger.age_shares({"cpus": workers * CPUS * 1000, "slots": workers * CPUS})
    yield


#: Rules that are in use together. Each new rule of the scheduler is added here.
RULES: Final[tuple[Rule, ...]] = (reservations, tenants)
#: Requests of the measured jobs, with and without tenants.
PLAIN: Final = (REQUEST,)
OF_TENANTS: Final = tuple(REQUEST + tenant_term(tenant_name(number)) for number in range(TENANTS))


def ruled(bench: Bench, scale: Scale) -> Mapping[str, float]:
    """Measure a cycle with the rules beside one without, for each size of the cluster and of the backlog."""
    figures, slowest = dict[str, float](), list[float]()
    for workers, name in ((FEW, "10"), (max(FEW, scale.of(MANY)), "10000")):
        with (
            bench.pair() as plain_pair,
            bench.pair() as ruled_pair,
            books(plain_pair, workers) as plain,
            books(ruled_pair, workers) as opened,
            ExitStack() as stack,
        ):
            for side in (plain, opened):
                side.fill_backlog(1, 1)
            for rule in RULES:
                stack.enter_context(rule(opened))
            for waiting, suffix in ((0, ""), (scale.of(WAITING), "_waiting")):
                plain.fill_backlog(waiting, SHAPES)
                opened.fill_backlog(waiting, SHAPES, TENANTS)
                bench.say(f"  {workers} workers, {waiting} waiting")
                figures[f"rules_{name}{suffix}"], most = _measured(bench, plain, opened, ruled_pair.redis_pid)
                slowest.append(most)
    return figures | {"rules_slowest_ms": max(slowest)}


def _measured(bench: Bench, plain: Books, opened: Books, server: int) -> tuple[float, float]:
    """Return the ratio of the costs, and the milliseconds of the slowest script with the rules."""
    ratio = _ratio(bench, plain, opened)
    with scripts_timed(bench, opened.ledger, server) as longest:
        for _ in range(TURNS):
            _cycles(opened, OF_TENANTS)
        return ratio, longest()


def _ratio(bench: Bench, plain: Books, opened: Books) -> float:
    """Return the median cost of a cycle with the rules over that without them."""
    costs: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * TURNS):
        with_rules = bool(turn % 2)
        costs[with_rules] += _cycles(opened, OF_TENANTS) if with_rules else _cycles(plain, PLAIN)
    ruled_, without = percentile(costs[True], 0.5), percentile(costs[False], 0.5)
    bench.say(f"  {ruled_:.0f} us with the rules, {without:.0f} us without: {ruled_ / without:.2f} x")
    return ruled_ / without


def _cycles(opened: Books, requests: Sequence[str]) -> list[float]:
    """Admit and release jobs, and return the microseconds of the scripts of each cycle."""
    client: Any = opened.ledger.client
    taken = []
    for number in range(CYCLES):
        client.config_resetstat()
        job, place = opened.new_job()
        opened.release(job, opened.ledger.submit(job, requests[number % len(requests)], place, opened.message))
        taken.append(float(client.info("commandstats")["cmdstat_evalsha"]["usec"]))
    return taken
