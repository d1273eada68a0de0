"""Pauses: which jobs they hold back, and which names can be paused."""

from __future__ import annotations

from typing import Any

import pytest

from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.fill import fill_or_keep
from celery_capacity.routing.policy.pauses import MAX_TASK_NAME, Kind, Pauses, Scope
from celery_capacity.routing.policy.placement import Book, Waiting, order
from celery_capacity.routing.policy.tenants import tenant_term

REQUEST = Request.of({"cpus": 1000})
ALONE = Request.of({"cpus": 1000, "alone": 1})


def waiting(
    job: str, seq: int, queue: str = "celery", task: str = "t", request: Request = REQUEST, tenant: str = "default"
) -> Waiting:
    return Waiting(job, request.within(queue), order(0, seq), task, terms=tenant_term(tenant))


@pytest.mark.parametrize(
    ("scope", "held"),
    [
        (Scope(Kind.PLATFORM), "abc"),
        (Scope(Kind.QUEUE, "celery"), "ac"),
        (Scope(Kind.QUEUE, "mail"), "b"),
        (Scope(Kind.TASK, "t"), "ab"),
        (Scope(Kind.TASK, "other"), ""),
        (Scope(Kind.TENANT, "ml"), "c"),
        (Scope(Kind.TENANT, "default"), "ab"),
    ],
    ids=str,
)
def test_pause_holds_back_the_jobs_of_its_scope_alone(scope: Scope, held: str) -> None:
    backlog = [waiting("a", 0), waiting("b", 1, queue="mail"), waiting("c", 2, task="u", tenant="ml")]
    pauses = Pauses(frozenset({scope}))
    assert "".join(job.job for job in backlog if pauses.covers(job)) == held
    book = Book("w", {"cpus": 9000, "slots": 9, "queue:mail": 1}, {})
    admitted = fill_or_keep(book, pauses.admissible(backlog), 9).admitted
    assert [job.job for job in admitted] == [job for job in "abc" if job not in held]


def test_worker_is_kept_for_a_paused_shape_no_longer() -> None:
    book = Book("w", {"cpus": 4000, "slots": 4}, {"cpus": 1000, "slots": 1})
    alone, later = waiting("alone", 0, request=ALONE), waiting("later", 1, task="u")
    kept = fill_or_keep(book, [alone, later], 9)
    assert (kept.admitted, kept.kept) == ([], alone.shape)
    book = Book("w", book.capacity, book.allocated, kept=kept.kept)
    pauses = Pauses(frozenset({Scope(Kind.TASK, "t")}))
    assert fill_or_keep(book, pauses.admissible([alone, later]), 9) == ([later], "")


@pytest.mark.parametrize(
    "names",
    [
        {"queue": "a", "task": "b"},
        {"queue": "a", "tenant": "b"},
        {"tenant": ""},
        {"tenant": "a b"},
        {"queue": ""},
        {"queue": "a b"},
        {"queue": "a,b"},
        {"task": ""},
        {"task": "a\n"},
        {"task": "t" * (MAX_TASK_NAME + 1)},
        {"task": "celery.chord_unlock"},
        {"task": "platform.tick"},
    ],
)
def test_name_that_cannot_be_paused_is_refused_with_advice(names: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Scope.of(**names)
    assert refused.value.advice


def test_scope_without_a_name_is_the_platform() -> None:
    assert (Scope.of(), str(Scope.of()), str(Scope.of(queue="mail"))) == ((Kind.PLATFORM, ""), "platform", "queue mail")
