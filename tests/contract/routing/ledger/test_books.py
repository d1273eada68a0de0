"""Books that are closed, reserved, torn, gone or over, and repeats that leave them as they are."""

from __future__ import annotations

import base64
import json
from typing import Final

import pytest

from celery_capacity.routing.inspect.waiting import queue_reads, read_backlog
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Adopted, Filled, LedgerClosed
from celery_capacity.routing.ledger.snapshot import HEAD_BYTES, read_head, read_jobs, read_many
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import State, WorkerStatus
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import order
from tests.fixtures.stores.books import MESSAGE, MOST_LOSSES, VIEW, job_field
from tests.fixtures.stores.cluster import CAPACITY, ONE, Cluster

#: A job's message as the platform writes it, with its body and id left open.
MESSAGE_TEXT: Final = (
    '{"body":"BODY","content-encoding":"utf-8","content-type":"application/json","headers":{"lang":"py",'
    '"task":"bench.noop","id":"ID","shadow":null,"eta":null,"expires":null,"group":null,"group_index":null,"retries":0,'
    '"timelimit":[null,null],"root_id":"ID","parent_id":null,"argsrepr":"()","kwargsrepr":"{}",'
    '"origin":"gen14808@vm","ignore_result":false,"replaced_task_nesting":0,"stamped_headers":null,"stamps":{},'
    '"capacity_request":{"shape":"cpus=1000,slots=1","declared":true,"format":1}},'
    '"properties":{"correlation_id":"ID","reply_to":"0438c828-4242-328f-9df8-4c7fb1bdacbf","delivery_mode":2,'
    '"delivery_info":{"exchange":"","routing_key":"celery"},"priority":0,"body_encoding":"base64"}}'
)


def test_draining_worker_drains_on_after_its_lease_ran_out_for_a_moment(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.ledger.drain("w", "w-life")
    cluster.expire()
    cluster.lapse(grace_ms=10**9)
    assert cluster.renew("job")
    assert (cluster.book()["status"], cluster.view()["status"]) == ("draining", "draining")
    assert cluster.submit("next") is None


def test_ready_worker_opens_with_its_view_after_its_lease_ran_out(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.expire()
    cluster.lapse(grace_ms=10**9)
    assert cluster.view() == {}
    assert cluster.submit("next") is None
    assert cluster.renew("job")
    assert cluster.client.hget(keys.held("w"), "next") == b"1.1"
    view = cluster.view()
    assert (view["status"], view["allocated_cpus"], view["allocated_memory"]) == ("ready", "2", "20")


def test_a_worker_with_a_reserved_book_has_to_register_before_it_is_open(cluster: Cluster) -> None:
    cluster.client.flushdb()
    cluster.ledger.open_epoch(2)
    assert cluster.ledger.reserve_book("w", "w-life", CAPACITY)
    assert not cluster.renew(), "the heartbeat knows no queue"
    assert cluster.submit("job") is None
    assert cluster.register() == Filled(1)
    assert cluster.client.llen("queue.w") == 1


def test_closed_worker_admits_nothing_before_it_renews(cluster: Cluster) -> None:
    cluster.ledger.leave("w", "w-life")
    assert cluster.ledger.register("w", "w-life", "queue.w", CAPACITY, VIEW, WorkerStatus.CLOSED) == Filled(0)
    assert cluster.submit("job") is None
    cluster.ledger.adopt("w", "w-life", [Adopted("held", Token(1, 1), ONE, 1, 5, 6, "", 0)])
    assert cluster.state("job") == "waiting"
    assert cluster.view()["status"] == "closed"
    assert cluster.renew("held")
    assert cluster.view()["status"] == "ready"
    assert cluster.client.hkeys(keys.held("w")) == [b"held", b"job"]


def test_a_worker_whose_confirmation_ran_out_stays_and_admits_nothing(cluster: Cluster) -> None:
    ledger = cluster.ledger
    ledger.leave("w", "w-life")
    assert cluster.submit("job") is None
    assert ledger.register("w", "w-life", "queue.w", CAPACITY, VIEW, admit=False) == Filled(0)
    assert ledger.renew("w", "w-life", {}, [], MOST_LOSSES, admit=False).known
    assert cluster.state("job") == "waiting"
    assert cluster.renew()
    assert cluster.state("job") == "admitted"


def test_a_job_that_never_started_is_not_lost_with_its_worker(cluster: Cluster) -> None:
    cluster.client.flushdb()
    cluster.ledger.open_epoch(2)
    cluster.ledger.reserve_book("w", "w-life", CAPACITY)
    held = [Adopted("idle", Token(1, 1), ONE, 1, 5, 0, "", 0), Adopted("busy", Token(1, 1), ONE, 2, 5, 6, "", 0)]
    assert cluster.ledger.adopt("w", "w-life", held) == []
    cluster.expire()
    assert cluster.lapse() == "gone"
    assert cluster.noted("idle") == [("accepted", "taken_back")]
    assert cluster.noted("busy") == [("accepted", "lost")]


def test_a_book_that_went_missing_comes_back_with_what_its_worker_holds(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.client.delete(keys.book("w"))
    assert not cluster.renew("job")
    cluster.register()
    assert (cluster.book()["a.cpus"], cluster.book()["a.memory"]) == ("1000", "10")
    assert cluster.client.zscore(keys.FREE, "w") == 3000
    cluster.end("job", Token(1, 1))
    assert (cluster.book()["a.cpus"], cluster.client.get(keys.ALLOCATED)) == ("0", b"0")


def test_a_book_that_went_missing_is_reserved_with_what_its_worker_holds(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.client.delete(keys.book("w"))
    assert cluster.ledger.reserve_book("w", "w-life", CAPACITY)
    assert (cluster.book()["status"], cluster.book()["a.cpus"]) == ("closed", "1000")


def test_a_torn_book_is_as_good_as_none(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.client.hdel(keys.book("w"), "lease")
    assert cluster.submit("next") is None
    assert cluster.ledger.reserve_book("w", "w-life", CAPACITY)
    assert cluster.book()["a.cpus"] == "1000"


def test_successor_of_a_lapsed_worker_takes_its_name_and_leaves_no_queue(cluster: Cluster) -> None:
    cluster.client.lpush("queue.w", "a doubled message")
    cluster.expire()
    assert isinstance(cluster.ledger.register("w", "next-life", "queue.next", CAPACITY, VIEW), Filled)
    assert cluster.client.exists("queue.w") == 0


def test_capacity_that_shrank_below_what_runs_is_said_until_it_fits_again(cluster: Cluster) -> None:
    for name in ("a", "b", "c"):
        cluster.run(name)
    cluster.register(capacity=Request.of({"cpus": 2000, "memory": 100, "slots": 8}).shape)
    assert cluster.book()["shrunk"] == "1"
    assert cluster.client.zscore(keys.FREE, "w") is None
    cluster.end("a", Token(1, 1))
    assert "shrunk" not in cluster.book()
    assert cluster.client.zscore(keys.FREE, "w") == 0


def test_holdings_of_an_older_epoch_may_exceed_the_capacity_of_now(cluster: Cluster) -> None:
    cluster.client.flushdb()
    cluster.ledger.open_epoch(2)
    cluster.ledger.reserve_book("w", "w-life", Request.of({"cpus": 500, "memory": 100}).shape)
    cluster.ledger.adopt("w", "w-life", [Adopted("job", Token(1, 1), ONE, 1, 5, 6, "", 0)])
    assert cluster.book()["shrunk"] == "1"


@pytest.mark.parametrize("way", ["a submit", "a registration", "a search"])
def test_worker_leaves_the_index_when_its_last_slot_is_taken(cluster: Cluster, way: str) -> None:
    cluster.ledger.leave("w", "w-life")
    narrow = Request.of({"cpus": 4000, "memory": 100, "slots": 1}).shape
    if way == "a submit":
        cluster.register(capacity=narrow)
        cluster.submit("job")
    elif way == "a registration":
        cluster.submit("job")
        cluster.register(capacity=narrow)
    else:
        # The job was filed by a submitter that died before it had looked at all workers.
        cluster.submit("job")
        cluster.register(capacity=narrow.replace("cpus=4000", "cpus=500"))
        cluster.client.hset(keys.book("w"), "c.cpus", 4000)
        cluster.client.zadd(keys.FREE, {"w": 4000})
        assert [placed.job for placed in cluster.ledger.place_shape(ONE)] == ["job"]
    assert cluster.client.zscore(keys.FREE, "w") is None
    cluster.claim("job", Token(1, 1))
    cluster.end("job", Token(1, 1))
    assert cluster.client.zscore(keys.FREE, "w") == 4000


# Other repeats.


def test_opening_an_epoch_twice_keeps_what_was_admitted_between(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.ledger.open_epoch(1)
    assert (cluster.client.get(keys.ALLOCATED), cluster.client.get(keys.ALLOCATED_CPUS)) == (b"1000", b"1")


def test_an_older_epoch_cannot_be_opened(cluster: Cluster) -> None:
    cluster.ledger.open_epoch(3)
    with pytest.raises(LedgerClosed) as caught:
        cluster.ledger.open_epoch(2)
    assert caught.value.epoch == 3


def test_a_job_whose_hash_was_lost_is_adopted_without_being_counted_twice(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.client.delete(keys.job("job"))
    assert cluster.ledger.adopt("w", "w-life", [Adopted("job", Token(1, 1), ONE, 1, 5, 6, "", 0)]) == []
    assert (cluster.book()["a.cpus"], cluster.client.get(keys.ALLOCATED)) == ("1000", b"1000")


def test_job_cancelled_on_its_way_to_the_ledger_is_not_admitted(cluster: Cluster) -> None:
    assert cluster.ledger.cancel("job", State.CANCELLED).verdict == "missing"
    assert cluster.ledger.submit("job", ONE, 1, MESSAGE).state == "exists"
    assert cluster.ledger.cancel("job", State.CANCELLED).verdict == "over"
    assert cluster.client.pttl(keys.job("job")) > 0


def test_a_cancel_during_a_rebuild_does_not_cost_a_running_job_its_lease(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.client.flushdb()
    cluster.ledger.open_epoch(2)
    assert cluster.ledger.cancel("job", State.CANCELLED).verdict == "unsure"
    cluster.register("w")
    assert cluster.ledger.adopt("w", "w-life", [Adopted("job", Token(1, 1), ONE, 1, 5, 6, "", 0)]) == []
    assert cluster.state("job") == "running"


def test_a_process_that_may_not_admit_places_nothing(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.register("other")
    assert cluster.end("job", Token(1, 1), "handed_back", admit=False).state == "waiting"
    assert cluster.state("job") == "waiting"
    assert cluster.client.hlen(keys.held("other")) == 0


def test_a_shape_that_nobody_waits_under_has_nothing_to_be_mended(cluster: Cluster) -> None:
    assert not cluster.ledger.repair_queue("cpus=7,slots=1")


@pytest.mark.leaves("I1", "I6", because="the book is deleted at last")
def test_a_job_is_put_into_its_places_once(cluster: Cluster) -> None:
    cluster.run("job")
    cluster.submit("next")
    assert [cluster.ledger.repair_job(job) for job in ("job", "next", "ghost")] == [0, 0, 0]
    cluster.client.hset(keys.held("w"), "job", "1.0")
    cluster.client.hdel(keys.held("w"), "next")
    cluster.client.hincrby(keys.book("w"), "a.cpus", -1000)
    cluster.client.zrem(keys.UNCLAIMED, "next")
    assert [cluster.ledger.repair_job(job) for job in ("job", "next")] == [1, 2]
    assert cluster.client.hgetall(keys.held("w")) == {b"job": b"1.1", b"next": b"1.1"}
    assert cluster.book()["a.cpus"] == "2000"
    cluster.client.delete(keys.book("w"))
    assert cluster.ledger.repair_job("job") is None


@pytest.mark.leaves("I6", because="the sum is set to a wrong one")
def test_a_sum_that_changed_since_it_was_read_is_left_alone(cluster: Cluster) -> None:
    cluster.run("job")
    assert not cluster.ledger.set_total(500, 7000)
    assert not cluster.ledger.set_total(None, 7000)
    assert (cluster.client.get(keys.ALLOCATED), cluster.client.get(keys.ALLOCATED_CPUS)) == (b"1000", b"1")
    assert cluster.ledger.set_total(1000, 1500)
    assert (cluster.client.get(keys.ALLOCATED), cluster.client.get(keys.ALLOCATED_CPUS)) == (b"1500", b"1.5")


def test_each_attempt_begins_anew_with_its_deliveries(cluster: Cluster) -> None:
    cluster.submit("job")
    for _ in range(3):
        cluster.client.zadd(keys.UNCLAIMED, {"job": 1})
        assert cluster.ledger.redeliver() == 1
    assert cluster.client.llen("queue.w") == 4
    cluster.ledger.drain("w", "w-life")
    cluster.register()
    cluster.client.zadd(keys.UNCLAIMED, {"job": 1})
    cluster.ledger.redeliver()
    assert job_field(cluster.client, "job", "redelivered") == b"1"


def test_nothing_is_delivered_to_a_worker_that_has_no_queue(cluster: Cluster) -> None:
    cluster.submit("job")
    cluster.client.delete(keys.book("w"))
    cluster.ledger.reserve_book("w", "w-life", CAPACITY)
    cluster.client.zadd(keys.UNCLAIMED, {"job": 1})
    assert cluster.ledger.redeliver() == 0
    assert cluster.client.exists("") == 0
    assert cluster.client.zscore(keys.UNCLAIMED, "job") > 1, "it is delivered when the worker is back"


@pytest.mark.parametrize("size", [1, 300, 60_000], ids=["small", "longer than what is read", "large"])
@pytest.mark.parametrize("resources", [0, 13], ids=["short head", "head that is read twice"])
def test_message_stays_whole_through_every_transition(cluster: Cluster, size: int, resources: int) -> None:
    amounts = {"cpus": 1000, "slots": 1, **{f"resource-{number:050}": 1 for number in range(resources)}}
    shape = Request.of(amounts).shape
    message = b'{"body":"' + b"x \n" * size + b'","properties":{"a":1}}'
    ledger = cluster.ledger
    ledger.leave("w", "w-life")
    assert ledger.submit("job", shape, order(0, 1), message).state == "waiting"
    cluster.written()
    cluster.register("w", shape)
    for attempt in (1, 2):
        token = Token(1, attempt)
        (delivered,) = cluster.client.lrange("queue.w", 0, -1)
        assert delivered == message[:-2] + f',"delivery_tag":"job:{token}"}}}}'.encode()
        cluster.client.delete("queue.w")
        assert cluster.claim("job", token).ok
        assert ledger.note_successor("job", message) is False, "the message is its own"
        cluster.written()
        head = read_jobs(cluster.client, ["job"])["job"]
        assert (head["state"], head["shape"], head["nonce"]) == ("running", shape, "n")
        if attempt == 1:
            cluster.end("job", token, "handed_back")
    assert ledger.hand_over_again("w", "w-life", [])[0].message.encode() == delivered
    cluster.end("job", token)
    assert cluster.client.strlen(keys.job("job")) < 100, "a tombstone has no message"


@pytest.mark.parametrize("arguments", [[], ["a"], ["ab"], ["abc"]])
def test_waiting_job_takes_up_little_memory_and_keeps_its_message(cluster: Cluster, arguments: list[str]) -> None:
    job = "53ed12d0-4add-4764-bc7e-7bb9aa3af9eb"
    body = [arguments, {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    message = MESSAGE_TEXT.replace("BODY", base64.b64encode(json.dumps(body).encode()).decode()).replace("ID", job)
    cluster.ledger.leave("w", "w-life")
    assert cluster.ledger.submit(job, ONE, order(0, 1), message.encode()).state == "waiting"
    assert cluster.client.strlen(keys.job(job)) < 400 < 800 < len(message)
    cluster.register("w")
    (delivered,) = cluster.client.lrange("queue.w", 0, -1)
    assert delivered.decode() == message[:-2] + f',"delivery_tag":"{job}:1.1"' + "}}"


def test_message_with_the_bytes_of_a_packed_one_comes_back_as_it_was(cluster: Cluster) -> None:
    message = b'{"body":"\x01\x02\x03","properties":{"a":1}}'
    cluster.ledger.leave("w", "w-life")
    assert cluster.ledger.submit("job", ONE, order(0, 1), message).state == "waiting"
    cluster.register("w")
    assert cluster.client.lrange("queue.w", 0, -1) == [message[:-2] + b',"delivery_tag":"job:1.1"}}']


@pytest.mark.parametrize("length", [1, HEAD_BYTES - 54, HEAD_BYTES])
def test_backlog_line_has_its_age_whatever_the_length_of_the_shape(ledger: Ledger, length: int) -> None:
    # The time of the submission stands behind the shape in the head of a job: for the second length it is cut.
    shape = f"{Request.of({}).shape},{'t' * length}"
    ledger.submit("job", shape, 1, MESSAGE, submitted_ms=ledger.measure() - 60_000)
    head = read_head(ledger.client)
    (line,) = read_backlog(ledger.client, head, iter(read_many(ledger.client, queue_reads(head.shapes))), [])
    assert line.oldest is not None
    assert line.oldest == pytest.approx(60, abs=30)
