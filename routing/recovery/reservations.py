"""Make the reservations of blocked jobs anew: which worker is reserved for which job, from when on.

The rules are `routing.policy.reservation`. The runner of the duties reads the first waiting shapes and the workers that
may take them, decides by the policy, and writes each reservation by a script. The script refuses where the books have
changed since they were read: the next pass judges anew. Between two passes the scripts that admit keep to the
reservations as they stand, so a late pass delays a reserved job by no more than that.

Of many workers only some are looked at. So a pass reads a bounded number of books and held jobs, and no command of it
holds Redis up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import redis

from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.ledger.admission import NONE_POSSIBLE, NONE_YET
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.snapshot import WorkerBook
from celery_capacity.routing.model.amounts import ALONE, LABEL
from celery_capacity.routing.model.request import Request, run_time_of, split_shape, terms_of
from celery_capacity.routing.policy.labels import named_worker
from celery_capacity.routing.policy.pauses import Kind
from celery_capacity.routing.policy.placement import CANDIDATES, SHAPES, Book, Waiting, fits
from celery_capacity.routing.policy.reservation import Held, Patience, Reservation, Rules, large_enough, passes, renew
from celery_capacity.routing.policy.tenants import Rule, Sharing, tenant_of

#: Held jobs that are read in one round trip.
CHUNK: Final = 200


@dataclass
class Memory:
    """Memory of a runner from one pass to the next.

    `held`: the held jobs that were read before, with the token of each attempt. So a pass reads only new ones.
    """

    patience: Patience = field(default_factory=Patience)
    held: dict[str, tuple[bytes, Held]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Seen:
    """State of the ledger at the beginning of a pass.

    `firsts`: the first jobs of the first waiting shapes that no pause and no quota holds back, in order. `kept`: shape
    -> worker that is kept for it. `reserved`: the names of the reserved workers, as the scripts know them, or their
    blanks without any.
    """

    now: int
    firsts: Mapping[str, Waiting]
    kept: Mapping[str, str]
    reserved: str
    workers: Sequence[str]


def renew_reservations(ledger: Ledger, rules: Rules, memory: Memory) -> dict[str, int]:
    """Make the reservations anew, and fill the workers that are free for others again.

    Counts: `reserved` workers, `overruns` of reserved times, workers `kept` from now on, `admitted` jobs.
    """
    if not rules.depth and not ledger.client.hexists(keys.EPOCH, "reserved"):
        return {}
    if ledger.is_unfinished():
        # Jobs that run may be unknown yet.
        return {}
    seen = _read(ledger.client)
    if not seen.reserved.strip() and not (rules.depth and seen.firsts):
        memory.patience.forget(())
        memory.held.clear()
        _note_reserved(ledger, NONE_YET if rules.depth else (), seen)
        return {}
    books = snapshot.read_books(ledger.client, seen.workers) if rules.depth else {}
    before = {book.reservation.shape: book.reservation for book in books.values() if book.reservation}
    tasks = {waiting.task for waiting in seen.firsts.values() if waiting.task}
    policy = _policy_books(ledger.client, books.values(), tasks, seen)
    heads = _heads(policy, before, seen, rules.depth)
    memory.patience.forget(seen.firsts)
    held = _held(ledger.client, policy, list(heads.values()), before, memory)
    renewed = renew(
        list(heads.values()),
        policy,
        held,
        seen.now,
        rules,
        {entry.worker: entry for entry in before.values()},
        memory.patience,
        seen.firsts,
    )
    reserved = sorted(renewed.reservations) or (NONE_POSSIBLE if heads else NONE_YET if rules.depth else ())
    admitted = _write(ledger, renewed.reservations, before, books, reserved, seen)
    counts = {"reserved": len(renewed.reservations), "overruns": renewed.overruns, "kept": renewed.keepings}
    return {**counts, "admitted": admitted}


def _read(client: redis.Redis) -> _Seen:
    pipe = client.pipeline(transaction=False)
    pipe.time()
    pipe.hgetall(keys.KEYS["kept"])
    pipe.hmget(keys.EPOCH, "reserved", "paused", "tenants")
    pipe.zrange(keys.SHAPES, 0, SHAPES - 1, withscores=True)
    pipe.zrange(keys.LEASES, 0, CANDIDATES)
    pipe.zrevrange(keys.FREE, 0, CANDIDATES - 1)
    time, kept, (reserved, paused, shared), shapes, leases, free = pipe.execute()
    kept = {snapshot.text(shape): snapshot.text(worker) for shape, worker in kept.items()}
    # Of many workers those with the most free CPUs are looked at, those that are reserved already, and named ones.
    some = leases if len(leases) <= CANDIDATES else [*free, *leases][:CANDIDATES]
    firsts = _admissible(client, [_waiting(snapshot.text(shape), int(order)) for shape, order in shapes], paused)
    named = [name for waiting in firsts.values() if (name := named_worker(waiting.terms))]
    workers = dict.fromkeys([*map(snapshot.text, some), *kept.values(), *named])
    return _Seen(
        now=int(time[0]) * 1000 + int(time[1]) // 1000,
        firsts=_within_quotas(client, firsts) if shared and firsts else firsts,
        kept=kept,
        reserved=snapshot.text(reserved or ""),
        workers=list(workers),
    )


def _waiting(shape: str, order: int) -> Waiting | None:
    """Return the first job of a shape in the form that the policy takes; None for a shape that is no valid request."""
    request, task, _ = split_shape(shape)
    try:
        return Waiting("", Request.from_shape(request), order, task, run_time_of(shape), terms_of(shape))
    except InvalidRequest:
        return None


def _admissible(client: redis.Redis, firsts: Iterable[Waiting | None], pauses: Any) -> dict[str, Waiting]:
    """Return the jobs that no pause holds back, by shape. `pauses`: the mark of the epoch, as lua/lib/controls.lua."""
    valid = {waiting.shape: waiting for waiting in firsts if waiting is not None}
    if not pauses or not valid:
        return valid
    asked = [name for waiting in valid.values() for name in _pausing(waiting)]
    replies = client.hmget(keys.KEYS["paused"], asked)
    paused = {name for name, value in zip(asked, replies, strict=True) if value is not None}
    return {shape: waiting for shape, waiting in valid.items() if paused.isdisjoint(_pausing(waiting))}


def _within_quotas(client: redis.Redis, firsts: Mapping[str, Waiting]) -> dict[str, Waiting]:
    """Return the jobs that no quota of their tenants holds back, by shape."""
    names = sorted({tenant_of(shape) for shape in firsts})
    texts = zip(names, client.hmget(keys.TENANTS, names), strict=True)
    rules = {name: Rule(quota=_quota(snapshot.text(rule))) for name, rule in texts if rule is not None}
    asked = [(name, resource) for name, rule in rules.items() for resource in rule.quota]
    amounts = client.hmget(keys.USED, [f"{name}/{resource}" for name, resource in asked]) if asked else []
    used: dict[str, dict[str, int]] = {name: {} for name in rules}
    for (name, resource), amount in zip(asked, amounts, strict=True):
        used[name][resource] = int(amount or 0)
    sharing = Sharing(rules, used)
    return {shape: waiting for shape, waiting in firsts.items() if sharing.may_start(waiting)}


def _quota(rule: str) -> dict[str, int]:
    """Return the quota in a rule as the ledger has it, see `Rule.text`."""
    parts = (part.partition("=") for part in rule.rpartition(";")[2].split(",") if part)
    return {name: int(amount) for name, _, amount in parts}


def _pausing(waiting: Waiting) -> tuple[str, ...]:
    """Return the fields of `ledger:paused` that hold a job back."""
    task, tenant = f"{Kind.TASK}:{waiting.task}", f"{Kind.TENANT}:{tenant_of(waiting.shape)}"
    return Kind.PLATFORM, f"{LABEL}{waiting.request.queue}", task, tenant


def _policy_books(client: redis.Redis, books: Iterable[WorkerBook], tasks: Collection[str], seen: _Seen) -> list[Book]:
    """Return the books for the policy, with these tasks. A reservation is left out, since it may move."""
    live = [book for book in books if book.is_live(seen.now)]
    catalogues = sorted({book.catalogue for book in live} - {""})
    # Without a task to ask for, each catalogue is known, and empty.
    knowing = snapshot.read_catalogues(client, catalogues, sorted(tasks))
    policy = [book.to_policy(seen.now, knowing) for book in live]
    return [book if book.reserved_at is None else replace(book, kept="", reserved_at=None) for book in policy]


def _heads(
    books: Sequence[Book],
    before: Mapping[str, Reservation],
    seen: _Seen,
    depth: int,
) -> dict[str, Waiting]:
    """Return the first blocked jobs by shape, in order, as many as the depth says.

    A job that is to be alone and has no worker yet comes first: nothing behind it is reserved.
    """
    heads: dict[str, Waiting] = {}
    # A worker that is reserved for a job which waits no more, or is paused, is free for others by this pass.
    reserved = {entry.worker: entry for entry in before.values() if entry.shape in seen.firsts}
    for shape, waiting in seen.firsts.items():
        if len(heads) >= depth:
            break
        able = large_enough(waiting, books)
        if waiting.request.get(ALONE):
            if able and shape not in seen.kept:
                break
        elif able and not any(_takes(waiting, book, reserved.get(book.worker), seen.now) for book in able):
            heads[shape] = waiting
    return heads


def _takes(waiting: Waiting, book: Book, reservation: Reservation | None, now: int) -> bool:
    """Return True if a worker is about to take a job."""
    return book.open and fits(waiting.request, book) is None and passes(waiting, reservation, now)


def _held(
    client: redis.Redis,
    books: Sequence[Book],
    heads: Sequence[Waiting],
    before: Mapping[str, Reservation],
    memory: Memory,
) -> dict[str, list[Held]]:
    """Return the jobs on the workers that may be reserved."""
    names = {book.worker for head in heads for book in large_enough(head, books)}
    names |= {entry.worker for entry in before.values() if entry.kept}
    workers = sorted(names)
    pipe = client.pipeline(transaction=False)
    for worker in workers:
        pipe.hgetall(keys.held(worker))
    lists = [{snapshot.text(job): token for job, token in held.items()} for held in pipe.execute()]
    tokens = {job: token for held in lists for job, token in held.items()}
    memory.held = {job: entry for job, entry in memory.held.items() if entry[0] == tokens.get(job)}
    new = [job for job in tokens if job not in memory.held]
    for start in range(0, len(new), CHUNK):
        for job, fields in snapshot.read_jobs(client, new[start : start + CHUNK]).items():
            if "admitted" in fields and "shape" in fields:
                memory.held[job] = (tokens[job], _held_job(fields))
    return {
        worker: [memory.held[job][1] for job in jobs if job in memory.held]
        for worker, jobs in zip(workers, lists, strict=True)
    }


def _held_job(fields: Mapping[str, Any]) -> Held:
    shape = fields["shape"]
    return Held(Request.from_shape(shape), int(fields["admitted"]), run_time_of(shape).expected)


def _write(
    ledger: Ledger,
    made: Mapping[str, Reservation],
    before: Mapping[str, Reservation],
    books: Mapping[str, WorkerBook],
    reserved: Sequence[str],
    seen: _Seen,
) -> int:
    """Write the reservations, and fill the workers that gained room for others; return how many jobs that admitted."""
    admitted = 0
    shapes = {entry.shape: entry.worker for entry in made.values()}
    for shape, worker in seen.kept.items():
        alone = Request.from_shape(shape).get(ALONE)
        if not alone and shapes.get(shape) != worker and (freed := ledger.unreserve(shape, reserved)):
            admitted += ledger.fill(freed)
    for entry in made.values():
        allocated = books[entry.worker].allocated
        if entry != before.get(entry.shape) and ledger.reserve(entry, allocated, reserved):
            admitted += ledger.fill(entry.worker)
    _note_reserved(ledger, reserved, seen)
    return admitted


def _note_reserved(ledger: Ledger, reserved: Sequence[str], seen: _Seen) -> None:
    if seen.reserved != " ".join(reserved):
        ledger.unreserve("", reserved)
