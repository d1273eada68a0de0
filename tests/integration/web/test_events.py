"""The stream of events: as they happen, again after the last one that a client saw, and from Postgres without Redis."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
import redis
from starlette.requests import ClientDisconnect

from celery_capacity.platform.web import transitions
from celery_capacity.platform.web.api import feed as feeds
from celery_capacity.platform.web.api.stream import EventStream
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.model.states import Store
from celery_capacity.routing.policy.placement import order
from tests.fixtures.servers.web import client_of, serving
from tests.fixtures.stores.staged import MESSAGE, Stage
from tests.fixtures.waiting import until
from tests.integration.web.test_api import application, client

__all__ = ["client"]


def events_of(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield the events of a stream, without ticks."""
    event: dict[str, Any] = {}
    for line in answer.iter_lines():
        name, _, value = line.partition(": ")
        if line:
            event[name] = value
        elif event.get("event", "tick") != "tick":
            yield {"id": event["id"], "kind": event["event"], **json.loads(event["data"])}
            event = {}
        else:
            event = {}


def test_stream_has_each_change_of_a_job(stage: Stage, client: httpx.Client) -> None:
    stage.worker("a", cpus=1000)
    with client.stream("GET", "/api/v1/events") as answer:
        events = events_of(answer)
        assert (answer.headers["content-type"]).startswith("text/event-stream")
        assert next(events)["source"] == "ledger"
        first, second = stage.submit(cpus=1000), stage.submit(cpus=1000)
        changes = [next(events) for _ in range(2)]
    assert [(change["job"], change["state"]) for change in changes] == [(first, "admitted"), (second, "waiting")]


def test_stream_goes_on_after_last_event_id(stage: Stage, client: httpx.Client) -> None:
    stage.worker("a", cpus=1000)
    with client.stream("GET", "/api/v1/events") as answer:
        last = next(events_of(answer))["id"]
    missed = [stage.submit(cpus=1000) for _ in range(3)]
    with client.stream("GET", "/api/v1/events", headers={"Last-Event-ID": last}) as answer:
        events = events_of(answer)
        changes = [next(events) for _ in range(3)]
    assert [change["job"] for change in changes] == missed
    numbers = [int(change["id"].partition("-")[2]) for change in changes]
    assert numbers == list(range(numbers[0], numbers[0] + 3))


@pytest.mark.parametrize("last", ["other-1", "x", "-", "\xb2"])
def test_stream_says_reset_after_unknown_event_id(last: str, client: httpx.Client) -> None:
    headers = [(b"Last-Event-ID", last.encode("latin-1"))]
    with client.stream("GET", "/api/v1/events", headers=headers) as answer:
        assert next(events_of(answer))["kind"] == "reset"


def test_stream_comes_from_postgres_without_redis(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transitions, "LOOK", 0.05)
    nowhere = redis.Redis(port=1, socket_connect_timeout=1)
    app = application(stage)
    app._feed._client = lambda: nowhere
    with (
        serving(app) as url,
        client_of(url) as asking,
        asking.stream("GET", "/api/v1/events") as answer,
    ):
        events = events_of(answer)
        assert next(events)["source"] == "postgres"
        job = stage.insert({"cpus": 1000})
        change = next(events)
    assert (change["job"], change["state"]) == (job, "accepted")
    nowhere.close()


def test_stream_from_postgres_tells_of_the_head_of_a_long_backlog(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transitions, "LOOK", 0.05)
    monkeypatch.setattr(transitions, "MAX_ROWS", 2)
    stage.worker("a", cpus=4000)
    first, *others = [stage.insert({"cpus": 1000}) for _ in range(4)]
    nowhere = redis.Redis(port=1, socket_connect_timeout=1)
    app = application(stage)
    app._feed._client = lambda: nowhere
    with (
        serving(app) as url,
        client_of(url) as asking,
        asking.stream("GET", "/api/v1/events") as answer,
    ):
        events = events_of(answer)
        assert next(events)["source"] == "postgres"
        changes = []
        for job in (first, others[-1]):
            row = stage.row(job)
            stage.ledger.submit(job, row.shape, order(0, row.seq), MESSAGE, submitted_ms=stage.ledger.now_ms())
            stage.apply()
            changes.append(next(events))
    # The second start brought another waiting job in sight, which is no news.
    assert [(change["job"], change["state"]) for change in changes] == [(first, "admitted"), (others[-1], "admitted")]
    nowhere.close()


def test_stream_is_refused_beyond_limit_of_clients(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "MAX_CLIENTS", 1)
    with (
        serving(application(stage)) as url,
        client_of(url) as asking,
        asking.stream("GET", "/api/v1/events") as answer,
    ):
        events = events_of(answer)
        next(events)
        refused = asking.get("/api/v1/events")
    assert (refused.status_code, refused.json()["reference"]) == (429, "too-many-requests")


def test_client_that_goes_before_the_first_event_takes_no_place(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "MAX_CLIENTS", 1)
    feed = application(stage)._feed

    async def gone(message: Any) -> None:
        raise OSError("the connection is closed")

    async def come_and_go() -> None:
        for _ in range(3):
            answer = EventStream(feed, feed.follow(None), paced=False)
            with suppress(OSError, ClientDisconnect):
                await answer({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, gone)
        feed.close()

    async def receive() -> Any:
        return await asyncio.Event().wait()

    asyncio.run(come_and_go())


def test_feed_goes_on_after_a_store_that_could_not_be_reached(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transitions, "LOOK", 0.05)
    app = application(stage)
    reached, read = app._feed._client, iter([True, True])

    def sometimes() -> Any:
        if next(read, False):
            raise StoreUnavailable("Redis does not answer")
        return reached()

    app._feed._client = sometimes
    with (
        serving(app) as url,
        client_of(url) as asking,
        asking.stream("GET", "/api/v1/events"),
    ):
        until(lambda: app._feed.source == Store.LEDGER, "events of the ledger")
