"""Both stores start what the policy starts while parts of the backlog are paused, and after they were resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from celery_capacity.routing.database import tenants
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Ended
from celery_capacity.routing.model.amounts import labels
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.request import Request, filed_shape
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.fill import fill_or_keep
from celery_capacity.routing.policy.pauses import Kind, Pauses, Scope
from celery_capacity.routing.policy.placement import MAX_ADMITTED, TOP_PRIORITY, Book, Waiting, order
from celery_capacity.routing.policy.tenants import Sharing, tenant_term
from celery_capacity.routing.recovery.controls import field_of
from celery_capacity.routing.store import claims
from tests.contract.routing.ledger.test_admission import ON_A_SERVER, REQUESTS, delivered, vectors, write
from tests.contract.routing.policy.test_tenants import SHARINGS
from tests.fixtures.property_tests import examples
from tests.fixtures.stores.books import MESSAGE, MOST_LOSSES, VIEW

SERVED: Final = ("celery", "mail", "Vidéo/hd")
TENANTS: Final = ("default", "physics", "ml")
TASKS: Final = ("tasks.render", "tasks.näht", "celery.chain")
BACKLOG: Final = st.lists(st.tuples(REQUESTS, st.integers(0, 9), st.sampled_from(TASKS)), max_size=30).map(
    lambda jobs: [
        Waiting(f"job-{seq}", request, order(rank, seq), "" if task.startswith("celery.") else task)
        for seq, (request, rank, task) in enumerate(jobs)
    ]
)
#: Such jobs of several tenants. Tenants take turns, so they are for tests in which the order does not matter.
OF_TENANTS: Final = st.builds(
    lambda jobs, tenants: [replace(job, terms=tenant_term(tenant)) for job, tenant in zip(jobs, tenants, strict=False)],
    BACKLOG,
    st.lists(st.sampled_from(TENANTS), min_size=30, max_size=30),
)
SCOPES: Final = (
    Scope(Kind.PLATFORM),
    *(Scope(Kind.QUEUE, queue) for queue in SERVED),
    *(Scope(Kind.TASK, task) for task in TASKS[:2]),
    *(Scope(Kind.TENANT, tenant) for tenant in TENANTS[:2]),
)
PAUSES: Final = st.frozensets(st.sampled_from(SCOPES), max_size=3).map(Pauses)


def passes(book: Book, backlog: Sequence[Waiting], pauses: Pauses) -> list[str]:
    """Return the jobs that the policy admits, pass after pass."""
    admitted: list[Waiting] = []
    while True:
        remaining = [job for job in backlog if job not in admitted]
        more = fill_or_keep(book, pauses.admissible(remaining), MAX_ADMITTED).admitted
        for waiting in more:
            book = book.holding(waiting.request)
        admitted += more
        if len(more) < MAX_ADMITTED:
            return [waiting.job for waiting in admitted]


def set_pauses(ledger: Ledger, version: int, pauses: Pauses) -> None:
    wanted = {("pause", field_of(scope)): "1" for scope in pauses.scopes}
    gone = {key: "" for key in ledger.controls() if key not in wanted}
    assert ledger.set_controls(version, {**gone, **wanted}, last=True)
    ledger.resume_shapes()


def file(ledger: Ledger, backlog: Sequence[Waiting]) -> None:
    for waiting in backlog:
        submitted = ledger.submit(waiting.job, filed_shape(waiting.request.shape, waiting.task), waiting.order, MESSAGE)
        assert submitted.state == "waiting"


@settings(ON_A_SERVER, max_examples=examples(300))
@given(BACKLOG, BACKLOG, vectors(st.integers(1, 50)), PAUSES, PAUSES)
def test_release_admits_what_the_policy_admits_under_pauses(
    ledger: Ledger,
    before: list[Waiting],
    after: list[Waiting],
    capacity: dict[str, int],
    pauses: Pauses,
    later: Pauses,
) -> None:
    write(ledger, [])
    ledger.client.delete(keys.WITHHELD)
    set_pauses(ledger, 1, Pauses())
    whole = Request.of(capacity)
    ledger.register("w", "life", "queue", Capacity(whole.amounts).serving(SERVED).shape, VIEW)
    assert ledger.submit("first", whole.shape, order(9, 0), MESSAGE).worker == "w"
    # Some jobs wait when the pause comes, and others are filed under it.
    before = [Waiting(f"early-{job.job}", *job_rest(job)) for job in before]
    file(ledger, before)
    set_pauses(ledger, 2, pauses)
    file(ledger, after)
    ledger.client.delete("queue")
    book, backlog = Book("w", {**capacity, **labels(SERVED)}, {}), [*before, *after]
    expected = passes(book, backlog, pauses)
    ended = [Ended("first", Token(1, 1), Outcome.SUCCEEDED)]
    assert ledger.settle("w", "life", ended=ended, most_losses=MOST_LOSSES).released[0].verdict == "released"
    assert delivered(ledger.client, "queue") == expected
    # The pauses change, and the worker is filled again.
    by_id = {job.job: job for job in backlog}
    for job in expected:
        book = book.holding(by_id[job].request)
    set_pauses(ledger, 3, later)
    ledger.fill("w")
    remaining = [job for job in backlog if job.job not in expected]
    assert delivered(ledger.client, "queue") == [*expected, *passes(book, remaining, later)]


def job_rest(job: Waiting) -> tuple[Request, int, str]:
    # Behind the jobs of the second list that have the same priority, for orders without ties.
    return job.request, job.order + 1000, job.task


@settings(ON_A_SERVER, max_examples=examples(300))
@given(OF_TENANTS, vectors(st.integers(1, 50)), PAUSES)
def test_submission_starts_at_once_only_if_it_is_not_paused(
    ledger: Ledger, backlog: list[Waiting], capacity: dict[str, int], pauses: Pauses
) -> None:
    write(ledger, [])
    ledger.client.delete(keys.WITHHELD)
    set_pauses(ledger, 1, pauses)
    ledger.register("w", "life", "queue", Capacity(Request.of(capacity).amounts).serving(SERVED).shape, VIEW)
    for waiting in backlog:
        shape = waiting.shape
        submitted = ledger.submit(waiting.job, shape, waiting.order, MESSAGE)
        assert not (submitted.worker and pauses.covers(waiting))
        assert ledger.place_shape(shape) == [] or not pauses.covers(waiting)
    paused = {job.job for job in backlog if pauses.covers(job)}
    assert not paused & {shape for shape, _ in ledger.find_room()}


def write_rows(engine: Engine, backlog: Sequence[Waiting], pauses: Pauses) -> None:
    """Have these jobs wait in Postgres, and no others, under these pauses alone."""
    rows: list[dict[str, Any]] = []
    for waiting in backlog:
        level, seq = divmod(waiting.order, order(TOP_PRIORITY - 1, 0))
        rows.append(
            {
                "id": waiting.job,
                "seq": seq,
                "name": waiting.task or "celery.chain",
                "priority": TOP_PRIORITY - level,
                "shape": waiting.shape,
                "queue": waiting.request.queue,
                "message": MESSAGE,
            }
        )
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM jobs"))
        connection.execute(text("DELETE FROM pauses"))
        if rows:
            connection.execute(
                text(
                    "INSERT INTO jobs (id, seq, name, state, priority, shape, request, queue, message)"
                    " VALUES (:id, :seq, :name, 'waiting', :priority, :shape, '{}', :queue, :message)"
                ),
                rows,
            )
        for scope in pauses.scopes:
            connection.execute(
                text("INSERT INTO pauses (kind, name, made_by) VALUES (:kind, :name, 'ann')"),
                {"kind": scope.kind.value, "name": scope.name},
            )


@settings(ON_A_SERVER, max_examples=examples(900))
@given(OF_TENANTS, vectors(st.integers(1, 50)), SHARINGS, PAUSES)
def test_pull_takes_what_the_policy_admits_under_pauses(
    engine: Engine, backlog: list[Waiting], capacity: dict[str, int], sharing: Sharing, pauses: Pauses
) -> None:
    write_rows(engine, backlog, pauses)
    book = Book("w", {**capacity, **labels(SERVED)}, {})
    with engine.connect() as connection, patch.object(tenants, "sharing_in_use", lambda _: sharing):
        chosen = claims.look(connection, book, MOST_LOSSES)
    admitted = fill_or_keep(book, pauses.admissible(backlog), MAX_ADMITTED, sharing=sharing).admitted
    assert [row.job for row in chosen] == [job.job for job in admitted]
    write_rows(engine, [], Pauses())
