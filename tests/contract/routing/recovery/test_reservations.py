"""The runner's look at blocked jobs: it reserves as the policy says, and nothing keeps a wide job waiting for ever."""

from __future__ import annotations

from typing import Final

import pytest

from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import State
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.feasibility import survey
from celery_capacity.routing.policy.placement import SHAPES, Refusal, Waiting
from celery_capacity.routing.policy.reservation import Patience, Reservation, Rules
from celery_capacity.routing.policy.tenants import Rule
from celery_capacity.routing.recovery import reservations
from celery_capacity.routing.recovery.reservations import Memory, renew_reservations
from tests.fixtures.stores.books import job_field
from tests.fixtures.stores.cluster import ONE, Cluster

WIDE: Final = Request.of({"cpus": 4000, "memory": 10}).shape
TOKEN: Final = Token(1, 1)
#: A head is blocked for ever before a worker is kept for it, or not at all.
TIMED, AT_ONCE = Rules(1, 10**9), Rules(1, 0)


class Passed(Patience):
    """Every running job came after the head, so that all of them have passed it."""

    def since(self, head: Waiting, now: int) -> int:
        super().since(head, now)
        return 0


def reservation(cluster: Cluster, worker: str = "w") -> Reservation | None:
    return snapshot.read_books(cluster.client, [worker])[worker].reservation


def look(cluster: Cluster, rules: Rules, memory: Memory | None = None) -> dict[str, int]:
    return renew_reservations(cluster.ledger, rules, memory or Memory(Patience() if rules.reserve_after else Passed()))


def expecting(shape: str, ms: int) -> str:
    return f"{shape},~{ms}"


def test_no_reservation_is_made_while_nothing_is_blocked(cluster: Cluster) -> None:
    cluster.run("one")
    assert look(cluster, AT_ONCE) == {}


def test_blocked_job_gets_the_worker_where_it_starts_soonest(cluster: Cluster) -> None:
    cluster.run("one", expecting(ONE, 512_000))
    cluster.register("x")
    cluster.run("two", expecting(WIDE, 256_000), "x")
    cluster.submit("wide", WIDE)
    assert look(cluster, TIMED)["reserved"] == 1
    assert reservation(cluster) is None
    made = reservation(cluster, "x")
    assert made is not None
    admitted = int(job_field(cluster.client, "two", "admitted") or 0)
    assert (made.shape, made.at, made.beside) == (WIDE, admitted + 256_000, {"memory": 90, "slots": 7})


def test_job_that_a_quota_holds_back_has_no_reservation(cluster: Cluster) -> None:
    cluster.run("one", expecting(ONE, 512_000))
    wide, rule = f"{WIDE},$physics", Rule(quota={"cpus": 4000, "memory": 9})
    cluster.submit("wide", wide)
    assert look(cluster, TIMED)["reserved"] == 1
    cluster.ledger.set_controls(1, {("tenant", "physics"): rule.text}, last=True)
    assert look(cluster, TIMED)["reserved"] == 0
    assert reservation(cluster) is None
    assert look(cluster, TIMED) == {}
    assert Rule.from_text(rule.text) == rule
    cluster.ledger.set_controls(2, {("tenant", "physics"): Rule(quota={"memory": 10}).text}, last=True)
    assert look(cluster, TIMED)["reserved"] == 1


def test_job_with_unknown_times_has_no_reservation_before_its_time(cluster: Cluster) -> None:
    cluster.run("one")
    cluster.submit("wide", WIDE)
    assert look(cluster, TIMED)["reserved"] == 0
    assert look(cluster, AT_ONCE) == {"reserved": 1, "overruns": 0, "kept": 1, "admitted": 0}
    made = reservation(cluster)
    assert made is not None
    assert made.kept
    assert made.beside == {"memory": 90, "slots": 7}


def test_time_at_the_head_counts_from_when_a_job_became_the_head(cluster: Cluster) -> None:
    memory, rules = Memory(), Rules(1, 10_000)
    token = cluster.run("one")
    cluster.submit("wide", WIDE)
    look(cluster, rules, memory)
    assert reservation(cluster) is None
    looks = memory.patience.looks
    memory.patience.looks = {shape: (head, since - 10_000, first) for shape, (head, since, first) in looks.items()}
    assert look(cluster, rules, memory)["kept"] == 1
    cluster.submit("wide-2", WIDE)
    cluster.end("one", token)
    assert cluster.state("wide") == "admitted"
    # The next one begins anew.
    look(cluster, rules, memory)
    assert reservation(cluster) is None


def test_worker_that_a_job_names_is_reserved_among_many(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "CANDIDATES", 1)
    cluster.run("one", expecting(ONE, 512_000))
    cluster.register("x")
    cluster.register("y")
    cluster.submit("wide", f"{WIDE},?@w")
    assert look(cluster, TIMED)["reserved"] == 1
    made = reservation(cluster)
    assert made is not None and made.shape == f"{WIDE},?@w"


def test_reservation_passes_over_a_job_without_quota_left(cluster: Cluster) -> None:
    cluster.client.hset(keys.TENANTS, "physics", "1;;slots=0")
    cluster.client.hset(keys.EPOCH, "tenants", "1")
    cluster.run("one", expecting(ONE, 512_000))
    cluster.submit("held-back", f"{WIDE},$physics")
    cluster.submit("wide", WIDE)
    assert look(cluster, TIMED)["reserved"] == 1
    made = reservation(cluster)
    assert made is not None and made.shape == WIDE


def test_head_is_the_job_of_the_tenant_whose_turn_is_next(cluster: Cluster) -> None:
    cluster.run("one", expecting(f"{ONE},$art", 512_000))
    cluster.client.hset(keys.TOTALS, "cpus", 4000)
    cluster.submit("wide", f"{WIDE},$art")
    assert look(cluster, TIMED)["reserved"] == 1
    # It holds up its own tenant's later jobs, and no tenant that is further below its share.
    cluster.submit("mine", f"{ONE},$art")
    cluster.submit("next", expecting(ONE, 512_000))
    assert (cluster.state("mine"), cluster.state("next")) == ("waiting", "admitted")
    cluster.submit("other", f"{WIDE},$physics")
    assert look(cluster, TIMED)["reserved"] == 1
    made = reservation(cluster)
    assert made is not None and made.shape == f"{WIDE},$physics"


def test_head_behind_many_shapes_is_reserved_once_it_is_among_the_first(cluster: Cluster) -> None:
    """A pass looks at so many shapes, whichever of them may ever start."""
    cluster.run("one", expecting(ONE, 512_000))
    for number in range(SHAPES):
        cluster.submit(f"huge-{number}", f"cpus={5000 + number},slots=1")
    cluster.submit("wide", WIDE)
    assert look(cluster, TIMED).get("reserved", 0) == 0
    cluster.ledger.cancel("huge-7", State.CANCELLED)
    assert look(cluster, TIMED)["reserved"] == 1
    made = reservation(cluster)
    assert made is not None and made.shape == WIDE


def test_head_of_a_tenant_behind_many_shapes_gets_its_turn(cluster: Cluster) -> None:
    cluster.run("one", expecting(f"{ONE},$art", 512_000))
    cluster.client.hset(keys.TOTALS, "cpus", 4000)
    for number in range(SHAPES):
        cluster.submit(f"art-{number}", f"cpus=4000,memory={1 + number},slots=1,$art")
    cluster.submit("wide", f"{WIDE},$physics")
    assert look(cluster, TIMED)["reserved"] == 1
    made = reservation(cluster)
    assert made is not None and made.shape == f"{WIDE},$physics"


def test_wide_job_starts_under_an_endless_stream_of_narrow_ones(cluster: Cluster) -> None:
    running = [f"narrow-{number}" for number in range(4)]
    for job in running:
        cluster.run(job)
    cluster.submit("wide", WIDE)
    look(cluster, AT_ONCE)
    for number in range(4, 12):
        cluster.submit(f"narrow-{number}")
        look(cluster, AT_ONCE)
        if running:
            cluster.end(running.pop(0), TOKEN)
    assert cluster.state("wide") == "admitted"
    assert all(cluster.state(f"narrow-{number}") == "waiting" for number in range(4, 12))


def test_worker_is_kept_only_where_other_jobs_passed_the_head(cluster: Cluster) -> None:
    memory = Memory()
    token = cluster.run("old")
    cluster.submit("wide", WIDE)
    # Jobs of the same millisecond count as started since.
    admitted = int(job_field(cluster.client, "old", "admitted") or 0)
    while cluster.ledger.now_ms() <= admitted:
        pass
    # The head waits for a job that ran before it: nothing is gained by keeping the worker.
    assert look(cluster, AT_ONCE, memory)["kept"] == 0
    cluster.run("passing")
    assert look(cluster, AT_ONCE, memory)["kept"] == 0
    cluster.end("old", token)
    looks = memory.patience.looks
    memory.patience.looks = {shape: (head, since - 10_000, first) for shape, (head, since, first) in looks.items()}
    assert look(cluster, AT_ONCE, memory)["kept"] == 1
    # Another runner, which begins anew, keeps it further.
    assert look(cluster, AT_ONCE, Memory()) == {"reserved": 1, "overruns": 0, "kept": 0, "admitted": 0}
    made = reservation(cluster)
    assert made is not None
    assert made.kept


def test_blocked_job_asks_for_a_look_at_once_while_none_is_reserved(cluster: Cluster) -> None:
    with cluster.client.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe(keys.LOW)

        def asked() -> list[bytes]:
            # The reply to a command of another connection comes after the messages that the command published.
            cluster.client.ping()
            messages = iter(lambda: pubsub.get_message(timeout=0.1), None)
            return [message["data"] for message in messages if message["type"] == "message"]

        pubsub.get_message(timeout=60)
        assert look(cluster, TIMED) == {}
        token = cluster.run("one", expecting(ONE, 512_000))
        assert asked() == []
        cluster.submit("wide", WIDE)
        assert asked() == [b"reserve"]
        assert look(cluster, TIMED)["reserved"] == 1
        cluster.submit("wider", Request.of({"cpus": 4000, "memory": 20}).shape)
        assert asked() == []
        # The next job is blocked from the start of the reserved one on.
        cluster.end("one", token)
        assert (cluster.state("wide"), asked()) == ("admitted", [b"reserve"])
        # Its time is unknown: another look would change nothing.
        assert look(cluster, TIMED)["reserved"] == 0
        cluster.submit("third", Request.of({"cpus": 3000, "memory": 10}).shape)
        assert asked() == []
        look(cluster, Rules(0))
        cluster.submit("fourth", Request.of({"cpus": 2000, "memory": 10}).shape)
        assert (asked(), cluster.client.hget(keys.EPOCH, "reserved")) == ([], None)


def test_reservation_moves_when_its_worker_drains_or_dies(cluster: Cluster) -> None:
    cluster.run("one")
    cluster.register("x")
    cluster.run("two", Request.of({"cpus": 4000, "memory": 10}).shape, "x")
    cluster.submit("wide", WIDE)
    look(cluster, AT_ONCE)
    assert reservation(cluster) is not None
    cluster.ledger.drain("w", "w-life")
    assert look(cluster, AT_ONCE)["reserved"] == 1
    moved = reservation(cluster, "x")
    assert moved is not None
    cluster.expire("x")
    cluster.lapse("x")
    assert look(cluster, AT_ONCE)["reserved"] == 0


def test_reservation_is_made_anew_after_the_ledger_was_lost(cluster: Cluster) -> None:
    cluster.run("one")
    cluster.submit("wide", WIDE)
    look(cluster, AT_ONCE)
    cluster.client.flushdb()
    cluster.ledger.open_epoch(2)
    cluster.ledger.finish_epoch(2)
    cluster.register()
    cluster.ledger.submit("other", ONE, 1, b'{"body":"","properties":{"a":1}}')
    cluster.ledger.submit("wide", WIDE, 2, b'{"body":"","properties":{"a":1}}')
    assert reservation(cluster) is None
    assert look(cluster, AT_ONCE)["reserved"] == 1
    assert reservation(cluster) is not None


def test_depth_of_zero_ends_reservations_and_fills_their_workers(cluster: Cluster) -> None:
    cluster.run("one")
    cluster.submit("wide", WIDE)
    look(cluster, AT_ONCE)
    cluster.submit("narrow")
    assert cluster.state("narrow") == "waiting"
    assert look(cluster, Rules(0))["admitted"] == 1
    assert (cluster.state("narrow"), reservation(cluster)) == ("admitted", None)
    assert cluster.client.hget(keys.EPOCH, "reserved") is None
    assert look(cluster, Rules(0)) == {}


def test_room_beside_the_head_that_others_gave_back_is_free_again(cluster: Cluster) -> None:
    capacity = Request.of({"cpus": 5000, "memory": 100, "slots": 8}).shape
    cluster.register("big", capacity)
    cluster.ledger.drain("w", "w-life")
    cluster.run("one", ONE, "big")
    cluster.run("two", ONE, "big")
    cluster.submit("wide", WIDE)
    # Jobs of the same millisecond count as started since the keeping.
    admitted = int(job_field(cluster.client, "two", "admitted") or 0)
    while cluster.ledger.now_ms() <= admitted:
        pass
    kept = Memory(Passed())
    look(cluster, AT_ONCE, kept)
    for job in ("beside", "waits"):
        cluster.submit(job)
    assert (cluster.state("beside"), cluster.state("waits")) == ("admitted", "waiting")
    cluster.claim("beside", TOKEN, "big")
    cluster.end("beside", TOKEN, worker="big")
    assert look(cluster, AT_ONCE, kept)["admitted"] == 1
    assert cluster.state("waits") == "admitted"


def test_depth_is_the_number_of_reserved_workers(cluster: Cluster) -> None:
    cluster.run("one")
    cluster.register("x")
    cluster.run("two", WIDE, "x")
    for number in range(3):
        cluster.submit(f"wide-{number}", Request.of({"cpus": 4000, "memory": 10 + number}).shape)
    assert look(cluster, Rules(3, 0))["reserved"] == 2
    books = snapshot.read_books(cluster.client, ["w", "x"])
    assert {book.reservation.shape for book in books.values() if book.reservation} == {
        Request.of({"cpus": 4000, "memory": memory}).shape for memory in (10, 11)
    }


def test_reserved_room_is_the_reason_that_a_later_job_waits_for(cluster: Cluster) -> None:
    cluster.run("one")
    cluster.submit("wide", WIDE)
    look(cluster, AT_ONCE)
    book = snapshot.read_books(cluster.client, ["w"])["w"].to_policy(cluster.ledger.now_ms())
    assert survey(Request.from_shape(ONE), [book]) == Refusal(Reason.RESERVED, worker="w")
    wide = survey(Request.from_shape(WIDE), [book])
    assert isinstance(wide, Refusal)
    assert wide.reason is Reason.NO_ROOM


def test_paused_head_has_no_reservation_and_frees_its_worker(cluster: Cluster) -> None:
    cluster.run("one")
    cluster.submit("wide", f"{WIDE},tasks.wide")
    look(cluster, AT_ONCE)
    assert reservation(cluster) is not None
    cluster.submit("narrow")
    assert cluster.state("narrow") == "waiting"
    cluster.ledger.set_controls(1, {("pause", "task:tasks.wide"): "1"}, last=True)
    assert look(cluster, AT_ONCE) == {"reserved": 0, "overruns": 0, "kept": 0, "admitted": 1}
    assert (cluster.state("narrow"), reservation(cluster)) == ("admitted", None)
    cluster.ledger.set_controls(2, {("pause", "platform"): "1", ("pause", "task:tasks.wide"): ""}, last=True)
    assert look(cluster, AT_ONCE) == {}


def test_cordoned_worker_has_no_reservation(cluster: Cluster) -> None:
    cluster.run("one")
    cluster.submit("wide", WIDE)
    look(cluster, AT_ONCE)
    cluster.ledger.set_controls(1, {("cordon", "w"): "cordoned"}, last=True)
    assert not {"kept", "kept_at", "kept_since", "kept_order", "beside"} & cluster.book().keys()
    assert look(cluster, AT_ONCE)["reserved"] == 0
    cluster.ledger.set_controls(2, {("cordon", "w"): ""}, last=True)
    assert look(cluster, AT_ONCE)["reserved"] == 1


def test_ending_worker_is_reserved_only_for_a_job_that_ends_there(cluster: Cluster) -> None:
    cluster.run("one", expecting(ONE, 512_000))
    cluster.client.hset(keys.book("w"), "ends", cluster.ledger.now_ms() + 600_000)
    cluster.submit("wide", expecting(WIDE, 256_000))
    assert look(cluster, TIMED)["reserved"] == 0
    cluster.client.hset(keys.book("w"), "ends", cluster.ledger.now_ms() + 800_000)
    assert look(cluster, TIMED)["reserved"] == 1
