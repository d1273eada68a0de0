"""The policy: the jobs that are admitted, where, in which order, and the reasons why not."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy import placement
from celery_capacity.routing.policy.feasibility import survey
from celery_capacity.routing.policy.fill import fill_or_keep
from celery_capacity.routing.policy.placement import (
    SUBMISSIONS,
    TOP_PRIORITY,
    Admission,
    Book,
    Refusal,
    Shortage,
    Waiting,
    choose,
    fits,
    found_by,
    order,
    shortages,
)

RESOURCES = ("cpus", "memory", "licence", "slots")
SMALL = st.dictionaries(st.sampled_from(RESOURCES), st.integers(0, 6), max_size=4)
REQUESTS = SMALL.map(lambda amounts: Request.of({**amounts, "slots": 1}))
CAPACITIES = SMALL.map(lambda amounts: {"slots": 3, **amounts})
BOOKS = st.lists(
    st.builds(Book, st.sampled_from("abcdefgh"), CAPACITIES, SMALL, st.booleans()),
    max_size=8,
    unique_by=lambda book: book.worker,
)
BACKLOG = st.lists(st.tuples(REQUESTS, st.integers(0, 9)), max_size=12).map(
    lambda jobs: [Waiting(f"job-{seq}", request, order(rank, seq)) for seq, (request, rank) in enumerate(jobs)]
)


def fill(worker: Book, backlog: Iterable[Waiting], most: int) -> list[Waiting]:
    """Return the jobs that one pass admits to the worker, in order."""
    return fill_or_keep(worker, backlog, most).admitted


def need(cpus: int, **more: int) -> Request:
    return Request.of({"cpus": cpus, **more})


def book(worker: str, cpus: int, allocated: int = 0, *, admitting: bool = True, **more: int) -> Book:
    return Book(worker, {"cpus": cpus, "slots": 100, **more}, {"cpus": allocated}, admitting)


def within(amounts: Mapping[str, int], capacity: Mapping[str, int]) -> bool:
    return all(amount <= capacity.get(name, 0) for name, amount in amounts.items())


# A single worker.


def test_a_request_fits_when_there_is_room_for_the_whole_vector() -> None:
    worker = book("a", 8, 4, memory=10)
    assert fits(need(4), worker) is None
    assert fits(need(4, memory=10), worker) is None
    assert fits(need(5), worker) == Shortage("cpus", 5, 4)
    assert fits(need(4, memory=11), worker) == Shortage("memory", 11, 10)


def test_what_a_worker_does_not_publish_it_has_none_of() -> None:
    assert fits(need(1, licence=1), book("a", 8)) == Shortage("licence", 1, 0)


def test_a_worker_over_its_capacity_takes_nothing_not_even_nothing() -> None:
    shrunk = Book("a", {"cpus": 2, "memory": 4, "slots": 9}, {"cpus": 3})
    assert fits(need(0), shrunk) == Shortage("cpus", 0, -1)
    assert fits(need(0, memory=1), shrunk) == Shortage("cpus", 0, -1)
    gone = Book("a", {"cpus": 8, "slots": 9}, {"licence": 1})
    assert fits(need(1), gone) == Shortage("licence", 0, -1)


def test_all_shortages_are_listed_by_name() -> None:
    assert shortages(need(9, memory=2, licence=1), book("a", 8, memory=2)) == [
        Shortage("cpus", 9, 8),
        Shortage("licence", 1, 0),
    ]


@given(REQUESTS, BOOKS)
def test_a_request_that_fits_never_exceeds_the_capacity(request_: Request, books: list[Book]) -> None:
    for worker in books:
        if fits(request_, worker) is None:
            assert within(worker.holding(request_).allocated, worker.capacity)
        else:
            asked = {**worker.allocated}
            for name, amount in request_.amounts:
                asked[name] = asked.get(name, 0) + amount
            assert not within(asked, worker.capacity)


@given(REQUESTS, BOOKS)
def test_a_release_undoes_an_admission(request_: Request, books: list[Book]) -> None:
    for worker in books:
        again = worker.holding(request_).without(request_)
        assert all(again.free(name) == worker.free(name) for name in RESOURCES)


# Choosing among workers.


def test_best_fit_leaves_the_least_cpus_and_ties_go_by_name() -> None:
    books = [book("wide", 72), book("b", 16, 8), book("a", 16, 8), book("full", 16, 13)]
    assert choose(need(4), books, 10) == Admission("a")
    assert choose(need(3), books, 10) == Admission("full")
    assert choose(need(9), books, 10) == Admission("wide")


def test_only_the_first_candidates_are_looked_at() -> None:
    plain, with_memory = {"slots": 9, "queue:video": 9}, {"slots": 9, "queue:video": 9, "memory": 1}
    books = [Book("a", {"cpus": 1, **plain}, {}), Book("b", {"cpus": 2, **plain}, {})]
    books.append(Book("c", {"cpus": 3, **with_memory}, {}))
    asks = need(1, memory=1).within("video")
    assert choose(asks, books, 3) == Admission("c")
    assert choose(asks, books, 2) == Refusal(Reason.LOOK_FURTHER, "cpus", 1, 2, "b")
    assert choose(asks, books, 2, after=(2, "b")) == Admission("c")
    assert choose(asks, books, 2, after=(3, "c")).__class__ is Refusal


def test_workers_without_the_queue_or_the_resource_are_no_candidates() -> None:
    books = [*(book(f"a{n}", 1) for n in range(9)), serving("b", "video"), book("c", 3, licence=1)]
    assert choose(need(1).within("video"), books, 1) == Admission("b")
    assert choose(need(1, licence=1), books, 1) == Admission("c")
    only = [*(serving(f"a{n}", "video") for n in range(9)), serving("b", "celery")]
    assert choose(need(1), only, 1) == Admission("b")


def test_candidates_have_the_rarest_resource_in_the_default_queue() -> None:
    books = [book("a", 1, gpus=1, licence=1), book("b", 2, licence=1), book("c", 3, licence=2, gpus=2)]
    assert found_by(need(1, gpus=1, licence=1), books) == "gpus"
    assert found_by(need(1, gpus=1, licence=1).within("video"), books) == "queue:video"
    assert found_by(need(1, memory=1), books) == "memory"
    assert found_by(need(1), books) == ""
    gpus_for_video_only = replace(serving("d", "video"), capacity={**serving("d", "video").capacity, "gpus": 1})
    assert gpus_for_video_only.index_names == {"queue:video"}


def test_rarest_resource_is_the_one_that_fewest_workers_may_have_free() -> None:
    books = [book("a", 1, gpus=2, memory=64), Book("b", {"cpus": 2, "gpus": 1, "memory": 9, "slots": 1}, {"memory": 9})]
    assert found_by(need(1, gpus=1, memory=1), books) == "memory"
    assert found_by(need(1, gpus=2, memory=1), books) == "gpus"
    assert choose(need(1, memory=1), books, 1) == Admission("a")


def test_workers_with_too_few_cpus_are_not_among_the_candidates() -> None:
    books = [*(book(f"small-{i}", 1) for i in range(50)), book("wide", 8)]
    assert choose(need(2), books, 1) == Admission("wide")


def test_a_worker_over_its_capacity_costs_no_look() -> None:
    over = Book("a", {"cpus": 2, "slots": 9}, {"memory": 1})
    assert choose(need(1), [over, book("b", 4)], 1) == Admission("b")


def test_cordoned_workers_are_passed_over() -> None:
    books = [book("a", 4, admitting=False), book("b", 8)]
    assert choose(need(1), books, 5) == Admission("b")
    assert choose(need(1), books[:1], 5) == Refusal(Reason.NO_WORKER)
    assert choose(need(1), [], 5) == Refusal(Reason.NO_WORKER)


def test_a_refusal_tells_of_the_worker_that_comes_closest() -> None:
    books = [book("a", 8, 7), book("b", 8, 5), book("c", 8, 6, memory=4)]
    assert choose(need(4), books, 5) == Refusal(Reason.NO_ROOM, "cpus", 4, 3, "b")
    assert choose(need(4, memory=4), books, 5) == Refusal(Reason.NO_ROOM, "cpus", 4, 2, "c")


@given(REQUESTS, BOOKS)
def test_with_enough_looks_the_choice_is_the_best_of_all_that_fit(request_: Request, books: list[Book]) -> None:
    fitting = [b for b in books if b.admitting and fits(request_, b) is None]
    decision = choose(request_, books, len(books))
    if fitting:
        assert decision == Admission(min(fitting, key=lambda b: (b.free("cpus"), b.worker)).worker)
    else:
        assert isinstance(decision, Refusal)
        assert decision.reason in (Reason.NO_WORKER, Reason.NO_ROOM)


@given(REQUESTS, BOOKS, st.integers(1, 3))
def test_going_on_by_the_cursor_finds_what_one_look_at_all_finds(
    request_: Request, books: list[Book], candidates: int
) -> None:
    decision = choose(request_, books, candidates)
    for _ in books:
        if isinstance(decision, Refusal) and decision.reason is Reason.LOOK_FURTHER:
            decision = choose(request_, books, candidates, after=(decision.free, decision.worker))
    at_once = choose(request_, books, len(books))
    assert decision == at_once or isinstance(decision, Refusal) == isinstance(at_once, Refusal)


@given(
    REQUESTS,
    BOOKS.flatmap(lambda books: st.tuples(st.just(books), st.permutations(books))),
    st.integers(1, 8),
)
def test_the_order_in_which_workers_are_given_does_not_matter(
    request_: Request, given_twice: tuple[list[Book], list[Book]], candidates: int
) -> None:
    books, shuffled = given_twice
    assert choose(request_, books, candidates) == choose(request_, shuffled, candidates)
    assert survey(request_, books) == survey(request_, shuffled)


# Why a job waits.


@pytest.mark.parametrize(
    ("request_", "books", "reason"),
    [
        (need(1), [], Refusal(Reason.NO_WORKER)),
        (need(1), [book("a", 8, admitting=False)], Refusal(Reason.NO_WORKER)),
        (need(1, licence=2), [book("a", 8)], Refusal(Reason.UNKNOWN_RESOURCE, "licence", 2)),
        (need(80), [book("a", 72, 72), book("b", 16)], Refusal(Reason.TOO_LARGE, "cpus", 80, 72, "a")),
        (
            need(40),
            [book("a", 72, admitting=False), book("b", 16)],
            Refusal(Reason.TOO_LARGE, "cpus", 40, 16, "b"),
        ),
        (need(9), [book("a", 16, 8), book("b", 8)], Refusal(Reason.NO_ROOM, "cpus", 9, 8, "a")),
        (need(9), [book("a", 16, 20), book("b", 8)], Refusal(Reason.NO_ROOM, "cpus", 9, -4, "a")),
    ],
)
def test_each_reason_says_what_is_short_where(request_: Request, books: list[Book], reason: Refusal) -> None:
    assert survey(request_, books) == reason


def serving(worker: str, *queues: str, cpus: int = 8, admitting: bool = True) -> Book:
    capacity = Capacity.of({"cpus": cpus, "slots": 8}).serving(queues)
    return Book(worker, dict(capacity.amounts), {}, admitting)


def test_only_a_worker_that_serves_its_queue_takes_a_job() -> None:
    books = [serving("a", "celery"), serving("b", "celery", "video"), serving("c", "video"), serving("d")]
    assert [b.worker for b in books if fits(need(1), b) is None] == ["a", "b"]
    assert [b.worker for b in books if fits(need(1).within("video"), b) is None] == ["b", "c"]
    assert not any(fits(need(1).within("mail"), b) is None for b in books)
    waiting = [Waiting("1", need(1), 1), Waiting("2", need(1).within("video"), 2), Waiting("3", need(1), 3)]
    assert [[job.job for job in fill(b, waiting, 9)] for b in books] == [["1", "3"], ["1", "2", "3"], ["2"], []]


def test_refusal_names_the_queue_first_and_then_only_those_that_serve_it() -> None:
    video = need(9).within("video")
    assert survey(video, [serving("a", "celery", cpus=99)]) == Refusal(Reason.NO_QUEUE)
    assert survey(need(1), [serving("a", "video")]) == Refusal(Reason.NO_QUEUE)
    assert survey(video, []) == Refusal(Reason.NO_WORKER)
    books = [serving("a", "celery", cpus=99), serving("b", "video", admitting=False)]
    assert survey(video, books) == Refusal(Reason.NO_WORKER)
    books = [serving("a", "celery", cpus=99), serving("b", "video")]
    assert survey(video, books) == Refusal(Reason.TOO_LARGE, "cpus", 9, 8, "b")


def test_worker_that_leaves_a_queue_is_not_over_by_what_it_still_holds() -> None:
    left = replace(serving("a", "celery"), allocated={"slots": 1, "queue:video": 1})
    assert (left.over, left.open) == (None, True)
    assert fits(need(1), left) is None
    assert fits(need(1).within("video"), left) == ("queue:video", 1, 0)


def test_two_workers_that_lack_one_thing_each_are_too_small_together() -> None:
    books = [book("a", 2, memory=9), book("b", 9, memory=2)]
    assert survey(need(4, memory=4), books) == Refusal(Reason.TOO_LARGE, "memory", 4, 2, "b")


def test_a_job_behind_others_of_its_shape_waits_for_them() -> None:
    assert survey(need(1), [book("a", 8)]) == Admission("a")
    assert survey(need(1), [book("a", 8)], ahead=3) == Refusal(Reason.BEHIND_SHAPE, asked=3, worker="a")
    assert survey(need(9), [book("a", 8)], ahead=3) == Refusal(Reason.TOO_LARGE, "cpus", 9, 8, "a")


def test_survey_says_that_no_worker_lives_long_enough_for_a_job() -> None:
    hour = 3_600_000
    short = [replace(book("a", 8), left=hour // 2), replace(book("b", 8), left=hour // 4), book("c", 1)]
    assert survey(need(4), short, bound=hour) == Refusal(Reason.NO_TIME, "time", hour, hour // 2, "a")
    assert survey(need(4), short, bound=hour // 4) == Admission("a")
    assert survey(need(4), short) == Admission("a"), "a job of an unknown time is taken"
    assert survey(need(4), [*short, book("d", 9)], bound=hour) == Admission("d")
    assert survey(need(4), [*short, book("d", 9, 9)], bound=hour).reason is Reason.NO_ROOM  # type: ignore[union-attr]
    assert choose(need(4), short, 9, bound=hour).reason is Reason.NO_ROOM  # type: ignore[union-attr]


@given(REQUESTS, BOOKS)
def test_a_survey_admits_exactly_where_the_choice_does(request_: Request, books: list[Book]) -> None:
    decision, chosen = survey(request_, books), choose(request_, books, len(books))
    if isinstance(chosen, Admission):
        assert decision == chosen
        return
    assert isinstance(decision, Refusal)
    empty = [replace(b, allocated={}) for b in books if b.admitting]
    fits_empty = any(fits(request_, b) is None for b in empty)
    assert (decision.reason is Reason.NO_ROOM) == fits_empty


@given(REQUESTS, BOOKS)
def test_a_refusal_s_numbers_are_those_of_the_books(request_: Request, books: list[Book]) -> None:
    decision = survey(request_, books)
    if isinstance(decision, Refusal) and decision.worker:
        (named,) = (b for b in books if b.worker == decision.worker)
        free = (
            named.capacity.get(decision.resource, 0)
            if decision.reason is Reason.TOO_LARGE
            else named.free(decision.resource)
        )
        assert (decision.asked, decision.free) == (request_.get(decision.resource), free)
        assert decision.asked > decision.free or decision.free < 0


# Order and filling.


@given(st.integers(0, TOP_PRIORITY), st.integers(0, SUBMISSIONS - 1))
def test_an_order_tells_both_numbers_and_is_exact_as_a_score(priority: int, seq: int) -> None:
    number = order(priority, seq)
    assert divmod(number, SUBMISSIONS) == (TOP_PRIORITY - priority, seq)
    assert int(float(number)) == number
    assert number < 2**53


@given(*[st.tuples(st.integers(0, 9), st.integers(0, SUBMISSIONS - 1))] * 2)
def test_higher_priorities_come_first_and_then_earlier_submissions(one: tuple[int, int], two: tuple[int, int]) -> None:
    assert (order(*one) < order(*two)) == ((-one[0], one[1]) < (-two[0], two[1]))


@pytest.mark.parametrize(("priority", "seq"), [(-1, 0), (10, 0), (0, -1), (0, SUBMISSIONS)])
def test_an_order_out_of_range_is_refused(priority: int, seq: int) -> None:
    with pytest.raises(ValueError, match="must be 0 to 9"):
        order(priority, seq)


def waiting(*jobs: tuple[int, int]) -> list[Waiting]:
    """Return waiting jobs of these (cpus, priority), in the order of submission."""
    return [Waiting(f"job-{seq}", need(cpus), order(rank, seq)) for seq, (cpus, rank) in enumerate(jobs)]


def names(jobs: list[Waiting]) -> list[str]:
    return [job.job for job in jobs]


def test_a_release_admits_by_priority_then_submission() -> None:
    assert names(fill(book("a", 3), waiting((1, 0), (1, 0), (1, 5), (1, 0)), 10)) == [
        "job-2",
        "job-0",
        "job-1",
    ]


def test_a_smaller_later_job_passes_one_that_does_not_fit() -> None:
    assert names(fill(book("a", 4), waiting((3, 0), (2, 0), (1, 0), (1, 0)), 10)) == ["job-0", "job-2"]
    assert names(fill(book("a", 2), waiting((3, 9), (2, 0)), 10)) == ["job-1"]


def test_a_release_admits_at_most_so_many() -> None:
    assert len(fill(book("a", 9), waiting(*[(1, 0)] * 9), most=4)) == 4


def test_what_waits_for_others_hides_nothing_from_a_release() -> None:
    asks = [need(1).within(f"queue-{n}") for n in range(9)] + [need(1, licence=1 + n) for n in range(9)] + [need(1)]
    backlog = [Waiting(f"job-{n}", request, n) for n, request in enumerate(asks)]
    assert names(fill(book("a", 4), backlog, most=10)) == ["job-18"]
    assert names(fill(serving("a", "queue-8", cpus=4), backlog, most=10)) == ["job-8"]
    assert names(fill(book("a", 4, licence=9), backlog, most=10)) == [*("job-9", "job-10", "job-11", "job-18")]


def test_nothing_is_admitted_to_a_worker_that_is_cordoned_or_over() -> None:
    assert fill(book("a", 9, admitting=False), waiting((1, 0)), 10) == []
    assert fill(book("a", 9, 10), waiting((0, 0)), 10) == []


def test_slots_bound_the_jobs_that_ask_for_nothing() -> None:
    worker = Book("a", {"cpus": 8, "slots": 2}, {})
    assert len(fill(worker, waiting(*[(0, 0)] * 5), 10)) == 2


@given(BOOKS, BACKLOG, st.integers(1, 12))
def test_a_pass_never_exceeds_capacity_and_takes_each_shape_in_order(
    books: list[Book], backlog: list[Waiting], most: int
) -> None:
    for worker in books:
        admitted = fill(worker, backlog, most)
        assert len({job.job for job in admitted}) == len(admitted) <= most
        after = worker
        for job in admitted:
            assert fits(job.request, after) is None
            after = after.holding(job.request)
        for shape in {job.request.shape for job in backlog}:
            queue = sorted((job for job in backlog if job.request.shape == shape), key=lambda job: job.order)
            taken = [job for job in admitted if job.request.shape == shape]
            assert taken == queue[: len(taken)]


@given(BOOKS, BACKLOG)
def test_after_a_whole_pass_nothing_that_waits_would_fit(books: list[Book], backlog: list[Waiting]) -> None:
    for worker in filter(lambda b: b.admitting, books):
        admitted = fill(worker, backlog, len(backlog))
        after = worker
        for job in admitted:
            after = after.holding(job.request)
        assert all(fits(job.request, after) for job in backlog if job not in admitted)


@given(BOOKS, BACKLOG)
def test_a_pass_is_the_same_as_one_admission_at_a_time(books: list[Book], backlog: list[Waiting]) -> None:
    for worker in books:
        one_by_one, left, after = [], list(backlog), worker
        while step := fill(after, left, 1):
            one_by_one += step
            left.remove(step[0])
            after = after.holding(step[0].request)
        assert one_by_one == fill(worker, backlog, len(backlog) or 1)


# The module itself.


def test_the_policy_imports_values_and_the_standard_library_only() -> None:
    assert placement.__file__
    tree = ast.parse(Path(placement.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= set(
        itertools.chain(*([a.name for a in node.names] for node in ast.walk(tree) if isinstance(node, ast.Import)))
    )
    ours = {name for name in imported if name and name.split(".")[0] == "celery_capacity"}
    values = [f"model.{name}" for name in ("amounts", "request", "capacity", "expected", "reasons")]
    policies = [f"policy.{name}" for name in ("amount_classes", "labels")]
    assert ours <= {f"celery_capacity.routing.{name}" for name in (*values, *policies)}
    assert not imported & {"time", "random", "logging", "datetime", "os", "redis", "sqlalchemy"}


def test_reasons_have_stable_names() -> None:
    assert {reason.value for reason in Reason} >= {
        "no-worker", "unknown-resource", "too-large", "no-room", "look-further", "behind-shape",
    }  # fmt: skip
