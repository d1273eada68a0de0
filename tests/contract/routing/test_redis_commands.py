"""Replies of Redis are read in C by hiredis, and in Python where it is missing: either gives the same values."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import redis
from redis._parsers import _HiredisParser, _RESP2Parser
from redis.exceptions import RedisError

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger import snapshot
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.connection import connect
from celery_capacity.routing.ledger.replies import Ended
from celery_capacity.routing.model.states import Outcome
from tests.fixtures.stores.cluster import ONE, Cluster

ROOT: Final = Path(__file__).resolve().parents[3]
PARSERS: Final = {"hiredis": _HiredisParser, "python": _RESP2Parser}
#: Larger than any buffer on the way.
LARGE: Final = b"\r\n$-1 " * 1_000_000
NESTED: Final = "return {1, 'a', {2, {3, '', {'deep', {'deeper', {}}}}}, false, {ok = 'fine'}}"

#: Connects where hiredis cannot be imported, and prints the class that reads the replies.
WITHOUT: Final = """
import sys
sys.modules["hiredis"] = None
from celery_capacity.routing.ledger.connection import connect
client = connect(sys.argv[1])
assert client.ping()
print(type(client.connection_pool.get_connection()._parser).__name__)
"""


@pytest.fixture(params=PARSERS)
def client(request: pytest.FixtureRequest, redis_url: str) -> Iterator[redis.Redis]:
    with connect(redis_url, parser_class=PARSERS[request.param]) as client:
        yield client


def outcome(ask: Callable[[], Any]) -> Any:
    """Return a reply, or the class and the text of its error."""
    try:
        return ask()
    except RedisError as error:
        return type(error), str(error)


def test_both_parsers_give_equal_replies_and_errors(redis_url: str) -> None:
    asked = []
    for parser in PARSERS.values():
        with connect(redis_url, parser_class=parser) as client:
            client.delete("hash", "large")
            client.set("large", LARGE)
            client.hset("hash", mapping={"a": "ä", "b": b"\xff\r\n"})
            pipe = client.pipeline(transaction=False)
            pipe.get("large").hincrby("large", "x", 1).exists("hash")
            asked.append(
                [
                    client.get("large") == LARGE,
                    client.hgetall("hash"),
                    client.eval(NESTED, 0),
                    client.mget(["none", "large-none"]),
                    outcome(lambda: client.evalsha("0" * 40, 0)),
                    outcome(lambda: client.get("hash")),
                    outcome(lambda: client.eval("return redis.error_reply('OOM full')", 0)),
                    outcome(lambda: client.eval("error('a script that fails')", 0))[0],
                    [type(reply) for reply in pipe.execute(raise_on_error=False)],
                    snapshot.read_many(client, [("HGETALL", "hash"), ("GET", "large"), ("EXISTS", "none")]),
                ]
            )
            client.delete("hash", "large")
    assert asked[0] == asked[1]
    assert asked[0][0] is True


def test_ledger_and_line_work_with_either_parser(cluster: Cluster, client: redis.Redis) -> None:
    ledger = Ledger(cluster.ledger.settings, client)
    ledger.epoch = cluster.ledger.epoch
    token = cluster.run("job", ONE)
    line = ledger.open_line()
    assert line is not None
    calls = ledger.prepare_settle("w", "w-life", ended=[Ended("job", token, Outcome.SUCCEEDED)], most_losses=3)
    ledger.settle("w", "w-life", ended=[Ended("other", token, Outcome.SUCCEEDED)], most_losses=3)
    ledger.send_settle(line, calls)
    settled = None
    while settled is None:
        settled = ledger.receive_settled(line, calls)
    line.close()
    assert [release.verdict for release in settled.released] == ["released"]


@contextmanager
def answering(text: bytes) -> Iterator[int]:
    """Serve a port that answers everything with these bytes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ended = threading.Event()

        def serve() -> None:
            while not ended.is_set():
                connection, _ = server.accept()
                with connection:
                    while connection.recv(4096) and not ended.is_set():
                        connection.sendall(text)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        port = server.getsockname()[1]
        try:
            yield port
        finally:
            ended.set()
            socket.create_connection(("127.0.0.1", port)).close()
            thread.join()


@pytest.mark.parametrize("parser", PARSERS)
def test_server_that_speaks_another_protocol_does_not_serve(settings: Settings, parser: str) -> None:
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        url = f"redis://127.0.0.1:{port}/0"
        ledger = Ledger(replace(settings, redis_url=url), connect(url, parser_class=PARSERS[parser]))
        with pytest.raises(StoreUnavailable, match="does not serve"):
            ledger.is_cold()
        ledger.client.close()


def test_replies_are_read_in_python_where_hiredis_is_missing(redis_url: str) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT, redis_url], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "_RESP2Parser", done.stderr


def test_replies_are_read_by_hiredis_where_it_is_there(redis_url: str) -> None:
    with connect(redis_url) as client:
        client.ping()
        connection: Any = client.connection_pool.get_connection()
        assert type(connection._parser) is _HiredisParser
        client.connection_pool.release(connection)
