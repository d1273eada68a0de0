"""A search looks at nothing that does not concern it: its cost is counted, not timed.

The cost does not grow with the workers that do not have what a job asks for. Nor does it grow with the waiting jobs
that a worker may not take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Ended
from celery_capacity.routing.ledger.scripts import FEW
from celery_capacity.routing.model.amounts import labels
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import CANDIDATES, SHAPES, Book, Waiting, order
from tests.contract.routing.ledger.test_admission import ON_A_SERVER, delivered, file, passes, write
from tests.fixtures.stores.books import FOR_EVER, MESSAGE, MOST_LOSSES, VIEW, job_field
from tests.fixtures.stores.cluster import CAPACITY, Cluster

ROOM: Final = {"cpus": 4000, "memory": 8, "slots": 4}
ONE: Final = Request.of({"cpus": 1000})
#: Amounts of most workers, amounts of one of them, and a request that this one alone can take.
RARE: Final = {
    "a queue beside the default one": (labels(["celery"]), labels(["celery", "mail"]), ONE.within("mail")),
    "a queue alone": (labels(["celery"]), labels(["mail"]), ONE.within("mail")),
    "the default queue": (labels(["mail"]), labels(["celery"]), ONE),
    "gpus": ({}, {"gpus": 9}, Request.of({"cpus": 1000, "gpus": 1})),
    "of two resources the rarer one": (
        {"licence": 9},
        {"licence": 9, "gpus": 9},
        Request.of({"cpus": 1000, "gpus": 1, "licence": 1}),
    ),
    "gpus, where others have a queue alone": (
        {"gpus": 9, **labels(["mail"])},
        {"gpus": 9},
        Request.of({"cpus": 1000, "gpus": 1}),
    ),
}


def asking(memory: int) -> Request:
    """Return a request for one CPU and so many bytes."""
    return Request.of({**dict(ONE.amounts), "memory": memory})


def commands(ledger: Ledger, action: Callable[[], object]) -> Counter[str]:
    """Return how often each command ran in the server meanwhile: a candidate that is looked at is an HMGET."""
    for script in ledger._scripts.values():
        ledger.client.script_load(script.text)
    ledger.client.config_resetstat()
    action()
    stats: Any = ledger.client.info("commandstats")
    return Counter({name: stat["calls"] for name, stat in stats.items()})


def crowd(workers: int, most: Mapping[str, int], one: Mapping[str, int], allocated: int = 0) -> list[Book]:
    """Return so many workers that come before the special one by their names."""
    books = [Book(f"w{n:04}", {**ROOM, **most}, {}) for n in range(workers)]
    return [*books, Book("x", {**ROOM, **one}, {"slots": allocated})]


# -- a worker for a job


@pytest.mark.parametrize("what", RARE)
def test_search_costs_the_same_beside_workers_without_the_resource(ledger: Ledger, what: str) -> None:
    most, rare, request = RARE[what]
    costs = []
    for workers in (1, 3 * CANDIDATES):
        write(ledger, crowd(workers, most, rare))

        def submit() -> None:
            taken = ledger.submit("job", request.shape, order(0, 1), MESSAGE)
            assert (taken.state, taken.worker) == ("admitted", "x")

        costs.append(commands(ledger, submit))
    assert costs[0] == costs[1]


@pytest.mark.leaves("I1", because="no job holds the slots that are taken")
@pytest.mark.parametrize("what", RARE)
def test_a_search_in_vain_costs_the_same_too(ledger: Ledger, what: str) -> None:
    most, rare, request = RARE[what]
    costs = []
    for workers in (1, 3 * CANDIDATES):
        write(ledger, crowd(workers, most, rare, allocated=ROOM["slots"]))

        def submit() -> None:
            assert ledger.submit("job", request.shape, order(0, 1), MESSAGE).state == "waiting"

        costs.append(commands(ledger, submit))
        costs.append(commands(ledger, lambda: ledger.place_shape(request.shape)))
    assert costs[:2] == costs[2:]


@pytest.mark.leaves("I1", because="no job holds the memory that is taken")
@pytest.mark.parametrize("lacked", ["memory", "gpus"])
@pytest.mark.parametrize("one_has_it", [True, False], ids=["one worker has it", "none has it"])
def test_search_costs_the_same_beside_workers_without_free_amounts(
    ledger: Ledger, lacked: str, one_has_it: bool
) -> None:
    costs, request = [], Request.of({"cpus": 1000, lacked: 7})
    for workers in (CANDIDATES, 9 * CANDIDATES):
        capacity = {**ROOM, "gpus": 8}
        full = [Book(f"w{n:04}", capacity, {lacked: 8 - n % 4}) for n in range(workers)]
        write(ledger, [*full, Book("x", capacity, {} if one_has_it else {lacked: 4})])

        def submit() -> None:
            taken = ledger.submit("job", request.shape, order(0, 1), MESSAGE)
            assert (taken.state, taken.worker) == (("admitted", "x") if one_has_it else ("waiting", None))

        costs.append(commands(ledger, submit))
    assert costs[0] == costs[1]


def test_search_reads_the_queues_of_its_first_candidate_alone(ledger: Ledger) -> None:
    queues = labels(["celery", *(f"queue-{n}" for n in range(99))])
    write(ledger, crowd(9, queues, {**queues, "memory": 9}))
    client: Any = ledger.client
    with client.monitor() as monitor:
        assert ledger.submit("job", asking(9).shape, order(0, 1), MESSAGE).worker == "x"
        client.echo("end")
        ran: list[str] = []
        while not ran or not ran[-1].startswith("ECHO"):
            ran.append(monitor.next_command()["command"])
    read = [command.split() for command in ran if command.startswith("HMGET ledger:book:")]
    assert [len(fields) for fields in read] == [15, 14, 14, 14, 14], read
    assert [command for command in ran if command.startswith("HGET ledger:book:")] == ["HGET ledger:book:x places"]


def test_admission_to_first_candidate_reads_its_book_once(ledger: Ledger) -> None:
    write(ledger, crowd(0, {}, {"memory": 9, "gpus": 2}))
    ran = commands(ledger, lambda: ledger.submit("job", asking(9).shape, order(0, 1), MESSAGE))
    assert ran["cmdstat_hmget"] >= 1
    assert ran["cmdstat_hget"] == 0
    assert ledger.client.zscore(keys.free_of("gpus"), "x") is not None


def test_a_worker_that_is_closed_or_leaves_stands_in_no_index(ledger: Ledger) -> None:
    def standing() -> list[str]:
        return sorted(key.decode() for key in ledger.client.scan_iter("ledger:free*"))

    def register(*queues: str, life: str = "life", **amounts: int) -> None:
        capacity = Capacity.of({**ROOM, **amounts}).serving(queues)
        ledger.register("w", life, "queue", capacity.shape, VIEW)

    register("celery", "mail", gpus=1)
    assert standing() == ["ledger:free", "ledger:free:gpus", "ledger:free:memory", "ledger:free:queue:mail"]
    register("mail", "Vidéo")
    assert standing() == ["ledger:free", "ledger:free:queue:Vidéo", "ledger:free:queue:mail"]
    assert ledger.client.zscore(keys.FREE, "w") == -1, "found by its queues alone"
    ledger.expire_lease("w", "life")
    assert standing() == []
    register("celery", "mail", life="next")
    assert standing() == ["ledger:free", "ledger:free:memory", "ledger:free:queue:mail"]
    ledger.client.hdel(keys.book("w"), "epoch")  # torn: COLD for this worker
    assert ledger.reserve_book("w", "next", Capacity.of(ROOM).shape)
    assert standing() == []
    register("celery", "mail", life="next")
    assert ledger.leave("w", "next") == 0
    assert standing() == []


# -- a job for a worker

#: Requests that wait before a job that fits, and may not go to a worker of the default queue without gpus.
FOREIGN: Final[dict[str, Callable[[int], Request]]] = {
    "of other queues": lambda n: ONE.within(f"queue-{n % 7}").merged({"cpus": 1 + n / 1000}),
    "each of its own queue": lambda n: ONE.within(f"queue-{n}"),
    "for gpus": lambda n: Request.of({"cpus": 1000 + n, "gpus": 1}),
    "for more CPUs": lambda n: Request.of({"cpus": 1001 + n}),
    "for memory": lambda n: Request.of({"cpus": n % 1000, "memory": 1 + n}),
}


@pytest.mark.parametrize("queues", [("celery",), tuple(f"own-{n}" for n in range(30))], ids=["one", "thirty"])
@pytest.mark.parametrize("what", FOREIGN)
def test_a_release_costs_the_same_however_much_waits_for_others(
    ledger: Ledger, what: str, queues: tuple[str, ...]
) -> None:
    costs = []
    for shapes in (2 * SHAPES, 30 * SHAPES):
        write(ledger, [])
        capacity = Capacity.of({"cpus": 1000, "slots": 1}).serving(queues)
        ledger.register("w", "life", "queue", capacity.shape, VIEW)
        request = ONE.within(queues[-1])
        assert ledger.submit("first", request.shape, order(9, 0), MESSAGE).worker == "w"
        rows = [(f"other-{n}", FOREIGN[what](n).shape, order(9, 1 + n), MESSAGE, 0, 0, 0) for n in range(shapes)]
        assert ledger.submit_many(rows) == shapes == ledger.client.zcard(keys.SHAPES)
        assert ledger.submit("own", request.shape, order(0, 9999), MESSAGE).state == "waiting"

        def release() -> None:
            ended = [Ended("first", Token(1, 1), Outcome.SUCCEEDED)]
            (settled,) = ledger.settle("w", "life", ended=ended, most_losses=MOST_LOSSES, follow=False).released
            assert settled.verdict == "released"

        costs.append(commands(ledger, release))
        assert job_field(ledger.client, "own", "worker") == b"w"
    assert costs[0] == costs[1]


def test_heartbeat_costs_the_same_however_much_waits(ledger: Ledger) -> None:
    costs = []
    for shapes in (1, 5 * SHAPES):
        write(ledger, [])
        ledger.register("w", "life", "queue", Capacity.of({"cpus": 1000, "memory": 9, "slots": 1}).shape, VIEW)
        wide = [Request.of({"cpus": 1001 + n}).shape for n in range(shapes)]
        rows = [(f"job-{n}", shape, order(0, n), MESSAGE, 0, 0, 0) for n, shape in enumerate(wide)]
        assert ledger.submit_many(rows) == shapes
        costs.append(commands(ledger, lambda: ledger.renew("w", "life", VIEW, [], MOST_LOSSES)))
    assert costs[0] == costs[1]


def test_heartbeat_fills_what_nobody_was_allowed_to_fill(ledger: Ledger) -> None:
    capacity = Capacity.of({"cpus": 1000, "slots": 1}).shape
    write(ledger, [])
    ledger.register("w", "life", "queue", capacity, VIEW)
    for n, job in enumerate(("first", "second")):
        ledger.submit(job, ONE.shape, order(0, n), MESSAGE)
    ended = [Ended("first", Token(1, 1), Outcome.SUCCEEDED)]
    ledger.settle("w", "life", ended=ended, most_losses=MOST_LOSSES, admit=False)
    assert ledger.client.hget(keys.book("w"), "unfilled") == b"1"
    ledger.renew("w", "life", VIEW, [], MOST_LOSSES)
    assert job_field(ledger.client, "second", "worker") == b"w"
    assert ledger.client.hget(keys.book("w"), "unfilled") is None


def test_heartbeat_fills_worker_that_opened_where_it_might_not_admit(cluster: Cluster) -> None:
    cluster.expire()
    assert (cluster.lapse(grace_ms=round(FOR_EVER * 1000)), cluster.submit("job")) == ("closed", None)
    cluster.ledger.renew("w", "w-life", {}, [], MOST_LOSSES, admit=False)
    cluster.renew()
    assert cluster.state("job") == "admitted"


def test_heartbeat_fills_room_of_a_removed_job_where_the_remover_died(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.run("job", CAPACITY)
    cluster.written()
    cluster.submit("next")
    with monkeypatch.context() as dying:
        dying.setattr(cluster.ledger, "fill", lambda *_: 0)
        assert cluster.ledger.remove_job("job", Token(1, 1), final=True)
    assert cluster.state("next") == "waiting"
    cluster.renew()
    assert cluster.state("next") == "admitted"


def test_full_worker_is_left_alone_by_the_heartbeats_after_it_opened(cluster: Cluster) -> None:
    cluster.run("job", CAPACITY)
    cluster.expire()
    cluster.renew("job")
    assert "unfilled" not in cluster.book()


def test_heartbeat_fills_room_of_jobs_taken_back_where_it_might_not(cluster: Cluster) -> None:
    cluster.run("job", CAPACITY)
    cluster.ledger.renew("w", "w-life", {}, [], MOST_LOSSES, admit=False, missing_ms=0)
    assert cluster.state("job") == "waiting"
    cluster.renew()
    assert cluster.state("job") == "admitted"


ASKED: Final = st.tuples(
    st.sampled_from(["celery", "mail", "Vidéo", "other"]), st.sampled_from([None, None, "gpus", "licence"])
)
HAS: Final = st.tuples(
    st.lists(st.sampled_from(["celery", "mail", "Vidéo", *(f"more-{n}" for n in range(20))]), min_size=1, unique=True),
    st.sets(st.sampled_from(["gpus", "licence"])),
)


@settings(ON_A_SERVER, max_examples=15)
@given(st.lists(ASKED, min_size=SHAPES // 2, max_size=SHAPES), st.integers(1, 60), HAS)
def test_worker_takes_jobs_in_policy_order_from_more_shapes_than_a_page(
    ledger: Ledger, asked: Sequence[tuple[str, str | None]], slots: int, has: tuple[list[str], set[str]]
) -> None:
    # Of the first page it may take little.
    asked = [*(("celery" if n % 9 == 0 else "other", None) for n in range(SHAPES)), *asked]
    backlog = [
        Waiting(f"job-{n}", Request.of({"cpus": n % 50, "memory": 1 + n, **({of: 1} if of else {})}).within(queue), n)
        for n, (queue, of) in enumerate(asked)
    ]
    queues, resources = has
    capacity = {"cpus": 10**6, "memory": 10**6, "slots": slots, **dict.fromkeys(resources, 9)}
    write(ledger, [])
    file(ledger, backlog)
    ledger.register("w", "life", "queue", Capacity.of(capacity).serving(queues).shape, VIEW)
    assert delivered(ledger.client, "queue") == passes(Book("w", {**capacity, **labels(queues)}, {}), backlog)


def test_worker_takes_jobs_of_other_shape_between_those_of_one(ledger: Ledger) -> None:
    first, other = asking(1), asking(2)
    # These fill the first page. The first shape moves behind it when its first job is admitted.
    wide = [Waiting(f"wide-{n}", Request.of({"cpus": 10**6 + n}), n) for n in range(1, FEW)]
    backlog = [Waiting("0", first, 0), *wide, Waiting("5", first, 5), Waiting("6", other, 6), Waiting("7", first, 7)]
    capacity = {"cpus": 3000, "memory": 8, "slots": 8}
    write(ledger, [])
    file(ledger, backlog)
    ledger.register("w", "life", "queue", Capacity.of(capacity).shape, VIEW)
    assert delivered(ledger.client, "queue") == passes(Book("w", capacity, {}), backlog) == ["0", "5", "6"]


# -- beside an index that is damaged


@pytest.mark.leaves("I6", because="an index is damaged")
def test_worker_outside_the_whole_index_is_not_admitted_to(ledger: Ledger) -> None:
    write(ledger, crowd(0, {}, labels(["celery", "mail"])))
    ledger.client.hset(keys.book("x"), "status", "draining")
    ledger.client.zrem(keys.FREE, "x")
    assert ledger.client.zscore(keys.free_of("queue:mail"), "x") == 4000
    assert ledger.submit("job", ONE.within("mail").shape, order(0, 1), MESSAGE).state == "waiting"


def test_heartbeat_puts_back_worker_that_is_missing_among_the_free(cluster: Cluster) -> None:
    cluster.renew()
    score = cluster.client.zscore(keys.FREE, "w")
    cluster.client.zrem(keys.FREE, "w")
    cluster.renew()
    assert cluster.client.zscore(keys.FREE, "w") == score


def test_heartbeat_writes_view_that_expired_anew(cluster: Cluster) -> None:
    fields = {**VIEW, "heartbeat_at": "now"}
    cluster.ledger.renew("w", "w-life", fields, [], MOST_LOSSES)
    view = cluster.view()
    cluster.client.delete(keys.view("w"))
    cluster.ledger.renew("w", "w-life", fields, [], MOST_LOSSES)
    assert cluster.view() == view


def test_heartbeat_repairs_places_and_view_once_in_each_ttl(cluster: Cluster) -> None:
    cluster.renew()
    score, view = cluster.client.zscore(keys.FREE, "w"), cluster.view()
    cluster.client.zadd(keys.FREE, {"w": 1})
    cluster.client.hset(keys.view("w"), "allocated_cpus", "7")
    # As if the last heartbeat had come in the ttl before: the lease ends with the present one.
    ttl = cluster.ledger.ttl_ms
    cluster.client.hset(keys.book("w"), "lease", (cluster.ledger.now_ms() // ttl + 1) * ttl - 1)
    cluster.renew()
    assert (cluster.client.zscore(keys.FREE, "w"), cluster.view()) == (score, view)


def test_heartbeat_without_a_change_writes_its_time_alone(ledger: Ledger) -> None:
    """Every worker beats all the time, and most have the same to say."""
    write(ledger, [])
    ledger.register("w", "life", "queue", Capacity.of({"cpus": 1000, "memory": 9, "slots": 1}).shape, VIEW)
    ledger.renew("w", "life", VIEW, [], MOST_LOSSES)
    cost = commands(ledger, lambda: ledger.renew("w", "life", {**VIEW, "heartbeat_at": "later"}, [], MOST_LOSSES))
    assert [cost[f"cmdstat_{name}"] for name in ("hset", "hgetall", "zadd")] == [2, 0, 1]
    assert ledger.client.hget(keys.view("w"), "heartbeat_at") == b"later"


def test_heartbeat_puts_its_worker_into_its_indexes(ledger: Ledger) -> None:
    write(ledger, crowd(0, {}, labels(["mail"])))
    index = keys.free_of("queue:mail")
    ledger.client.zadd(keys.FREE, {"x": 4000})
    ledger.client.zrem(index, "x")
    assert ledger.renew("x", "x-life", {}, [], MOST_LOSSES).known
    assert (ledger.client.zscore(index, "x"), ledger.client.zscore(keys.FREE, "x")) == (4000, -1)
