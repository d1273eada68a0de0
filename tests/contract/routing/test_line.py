"""A worker's calls on a connection of their own, with a server that answers."""

from __future__ import annotations

from typing import Final

import pytest

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Arrived, Ended, Settled
from celery_capacity.routing.ledger.scripts import HAND_OVER_BYTES
from celery_capacity.routing.line import Line
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import order
from tests.fixtures.stores.books import MOST_LOSSES
from tests.fixtures.stores.cluster import ONE, Cluster

THREE: Final = Request.of({"cpus": 3000, "memory": 10}).shape
#: Largest message that comes in a reply.
LARGE: Final = b"x" * HAND_OVER_BYTES


def opened(ledger: Ledger) -> Line:
    line = ledger.open_line()
    assert line is not None
    return line


def settled(ledger: Ledger, line: Line, ended: list[Ended], arrived: list[Arrived]) -> Settled:
    calls = ledger.prepare_settle("w", "w-life", ended=ended, arrived=arrived, most_losses=MOST_LOSSES, nonce="7")
    ledger.send_settle(line, calls)
    reply: Settled | None = None
    while reply is None:
        reply = ledger.receive_settled(line, calls)
    return reply


def test_release_and_claim_go_in_one_call_whose_reply_brings_jobs(cluster: Cluster) -> None:
    token = cluster.run("ended", THREE)
    jobs = [f"job-{number}" for number in range(5)]
    cluster.ledger.submit_many([(job, ONE, order(1, at), LARGE, 0, 0, 0) for at, job in enumerate(jobs)])
    # Beside the job that ends one fits, and three of the others fit when it has ended.
    (arrived,) = (job for job in jobs if cluster.state(job) == "admitted")
    # The server learns the script by a usual call.
    cluster.end("ended", Token(1, 9))
    line = opened(cluster.ledger)
    ended = [Ended("ended", token, Outcome.SUCCEEDED)]
    reply = settled(cluster.ledger, line, ended, [Arrived(arrived, token, "n")])
    line.close()
    assert [release.verdict for release in reply.released] == ["released"]
    assert [(claim.job, claim.ok) for claim in reply.claimed] == [(arrived, True)]
    assert [job.job for job in reply.handed_over] == jobs[1:4]
    # The script writes the delivery at the end of a message.
    assert all(job.message.count("x") > HAND_OVER_BYTES - 100 for job in reply.handed_over)
    assert cluster.end("ended", token).verdict == "repeat"


def test_script_that_the_server_lost_is_an_error_of_the_call(cluster: Cluster) -> None:
    token = cluster.run("job")
    line = opened(cluster.ledger)
    cluster.client.script_flush()
    with pytest.raises(StoreUnavailable, match="NOSCRIPT"):
        settled(cluster.ledger, line, [Ended("job", token, Outcome.SUCCEEDED)], [])
    line.close()
    assert cluster.end("job", token).verdict == "released"


def test_connections_that_were_closed_leave_room_for_others(cluster: Cluster) -> None:
    """A worker closes its own when it idles, and its pool of connections lasts as long as the worker."""
    pool = cluster.client.connection_pool
    pool.max_connections = 3
    for _ in range(10):
        opened(cluster.ledger).close()
    pool.disconnect()
    held = [pool.get_connection() for _ in range(2)]
    for connection in held:
        pool.release(connection)


def test_server_asked_in_another_protocol_is_left_to_the_usual_calls(redis_url: str) -> None:
    url = f"{redis_url}{'&' if '?' in redis_url else '?'}protocol=3"
    settings = Settings.from_environ({"REDIS_URL": url, "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"})
    ledger = Ledger(settings)
    assert ledger.open_line() is None
    ledger.client.close()
