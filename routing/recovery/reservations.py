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
from celery_capacity.routing.ledger.scripts import FEW, TENANTS_IN_TURN
from celery_capacity.routing.ledger.snapshot import WorkerBook
from celery_capacity.routing.model.amounts import ALONE, DEFAULT_QUEUE, LABEL
from celery_capacity.routing.model.request import Request, run_time_of, split_shape, terms_of
from celery_capacity.routing.policy.labels import named_worker
from celery_capacity.routing.policy.pauses import Kind
from celery_capacity.routing.policy.placement import CANDIDATES, SHAPES, Book, Waiting
from celery_capacity.routing.policy.reservation import (
    Held,
    Patience,
    Reservation,
    Rules,
    is_taken,
    large_enough,
    place_in_line,
    planned,
    renew,
)
from celery_capacity.routing.policy.tenants import TENANT_SIGN, Rule, Sharing, tenant_of

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
    blanks without any. `sharing`: the shares of tenants, None where none are in use.
    """

    now: int
    firsts: Mapping[str, Waiting]
    kept: Mapping[str, str]
    reserved: str
    workers: Sequence[str]
    sharing: Sharing | None = None


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
    seen = replace(seen, firsts={shape: planned(first, policy, seen.sharing) for shape, first in seen.firsts.items()})
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
    if shared and len(shapes) == SHAPES:
        shapes = [*shapes, *_heads_of_tenants(client)]
    firsts = _admissible(client, [_waiting(snapshot.text(shape), int(order)) for shape, order in shapes], paused)
    firsts, sharing = _in_line(client, firsts) if shared and firsts else (firsts, None)
    named = [name for waiting in firsts.values() if (name := named_worker(waiting.terms))]
    workers = dict.fromkeys([*map(snapshot.text, some), *kept.values(), *named])
    return _Seen(
        now=int(time[0]) * 1000 + int(time[1]) // 1000,
        firsts=firsts,
        kept=kept,
        reserved=snapshot.text(reserved or ""),
        workers=list(workers),
        sharing=sharing,
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


def _heads_of_tenants(client: redis.Redis) -> list[tuple[bytes, float]]:
    """Return the first shapes of each tenant, with the orders of their first jobs."""
    tenants = client.zrange(keys.TENANT_HEADS, 0, TENANTS_IN_TURN - 1)
    pipe = client.pipeline(transaction=False)
    for name in [LABEL + DEFAULT_QUEUE, *(f"{TENANT_SIGN}{snapshot.text(tenant)}" for tenant in tenants)]:
        pipe.zrange(keys.KEYS["shapes_of"] + name, 0, FEW - 1, withscores=True)
    return [row for rows in pipe.execute() for row in rows]


def _sharing(client: redis.Redis, firsts: Collection[str]) -> Sharing:
    """Return the shares of the tenants of these shapes."""
    names = sorted({tenant_of(shape) for shape in firsts})
    pipe = client.pipeline(transaction=False)
    pipe.hmget(keys.TENANTS, names)
    pipe.hmget(keys.PAST, names)
    pipe.hgetall(keys.TOTALS)
    pipe.hgetall(keys.USED)
    rules, past, total, use = pipe.execute()
    used: dict[str, dict[str, int]] = {}
    for field_, amount in use.items():
        tenant, _, name = snapshot.text(field_).partition("/")
        used.setdefault(tenant, {})[name] = int(amount)
    return Sharing(
        {name: Rule.from_text(snapshot.text(rule)) for name, rule in zip(names, rules, strict=True) if rule},
        used,
        {name: float(share) for name, share in zip(names, past, strict=True) if share},
        {snapshot.text(name): int(amount) for name, amount in total.items()},
    )


def _in_line(client: redis.Redis, firsts: Mapping[str, Waiting]) -> tuple[dict[str, Waiting], Sharing]:
    """Return the jobs that no quota of their tenants holds back, by shape, in the order of their places."""
    sharing = _sharing(client, firsts)
    in_line = {shape: place_in_line(shape, first.order, sharing) for shape, first in firsts.items()}
    some = sorted((shape for shape, first in firsts.items() if sharing.may_start(first)), key=lambda s: (in_line[s], s))
    return {shape: firsts[shape] for shape in some[:SHAPES]}, sharing


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
        elif able and not any(
            is_taken(waiting, book, reserved.get(book.worker), seen.now, seen.sharing) for book in able
        ):
            heads[shape] = waiting
    return heads


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
        # A worker that is another shape's from now on is not filled in between: `reserve` takes its place.
        ends = not alone and shapes.get(shape) != worker and (shape in shapes or worker not in made)
        if ends and (freed := ledger.unreserve(shape, reserved)):
            admitted += ledger.fill(freed)
    for entry in made.values():
        allocated = books[entry.worker].allocated
        changed = entry != before.get(entry.shape) and ledger.reserve(entry, allocated, reserved)
        # A job of a tenant whose turn has come may pass a reservation that stays.
        if changed or seen.sharing is not None:
            admitted += ledger.fill(entry.worker)
    _note_reserved(ledger, reserved, seen)
    return admitted


def _note_reserved(ledger: Ledger, reserved: Sequence[str], seen: _Seen) -> None:
    if seen.reserved != " ".join(reserved):
        ledger.unreserve("", reserved)
