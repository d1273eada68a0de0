"""The stream of events: as they happen, again after the last one that a client saw, and from Postgres without Redis."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import redis

from celery_capacity.platform.web.api import feed as feeds
from tests.fixtures.servers.web import serving
from tests.fixtures.stores.staged import Stage
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
    monkeypatch.setattr(feeds, "LOOK", 0.05)
    nowhere = redis.Redis(port=1, socket_connect_timeout=1)
    app = application(stage)
    app._feed._client = lambda: nowhere
    with (
        serving(app) as url,
        httpx.Client(base_url=url, timeout=60) as asking,
        asking.stream("GET", "/api/v1/events") as answer,
    ):
        events = events_of(answer)
        assert next(events)["source"] == "postgres"
        job = stage.insert({"cpus": 1000})
        change = next(events)
    assert (change["job"], change["state"]) == (job, "accepted")
    nowhere.close()


def test_stream_is_refused_beyond_limit_of_clients(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "MAX_CLIENTS", 1)
    with (
        serving(application(stage)) as url,
        httpx.Client(base_url=url, timeout=60) as asking,
        asking.stream("GET", "/api/v1/events") as answer,
    ):
        events = events_of(answer)
        next(events)
        refused = asking.get("/api/v1/events")
    assert (refused.status_code, refused.json()["reference"]) == (429, "too-many-requests")
