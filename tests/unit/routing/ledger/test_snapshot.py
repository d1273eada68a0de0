"""Reads of many keys at once: the bytes that are sent, and the connection afterwards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import redis

from celery_capacity.routing.ledger.snapshot import parse_book, part_book, read_many


class Connection:
    """A connection that gives prepared replies, and raises those that are errors."""

    def __init__(self, replies: list[Any]) -> None:
        self.replies = replies
        self.sent: list[bytes] = []
        self.fate: list[str] = []

    def send_packed_command(self, command: list[bytes]) -> None:
        self.sent.append(b"".join(command))

    def read_response(self) -> Any:
        reply = self.replies.pop(0)
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def disconnect(self) -> None:
        self.fate.append("disconnected")


def _client(connection: Connection) -> Any:
    def release(_: Connection) -> None:
        connection.fate.append("released")

    return SimpleNamespace(connection_pool=SimpleNamespace(get_connection=lambda: connection, release=release))


def test_many_commands_are_sent_at_once_and_answered_in_order() -> None:
    connection = Connection([{b"a": b"1"}, [None, b"x"]])
    replies = read_many(_client(connection), [("HGETALL", "book:w\u00e9"), ("HMGET", "view", "pid", "host")])
    assert replies == [{b"a": b"1"}, [None, b"x"]]
    assert connection.sent == [
        b"*2\r\n$7\r\nHGETALL\r\n$8\r\nbook:w\xc3\xa9\r\n*4\r\n$5\r\nHMGET\r\n$4\r\nview\r\n$3\r\npid\r\n$4\r\nhost\r\n"
    ]
    assert connection.fate == ["released"]


def test_no_command_takes_no_connection() -> None:
    connection = Connection([])
    assert read_many(_client(connection), []) == []
    assert connection.fate == []


@pytest.mark.parametrize(
    "error", [redis.ResponseError("WRONGTYPE"), redis.ConnectionError("gone"), KeyboardInterrupt()]
)
def test_unread_replies_do_not_stay_on_the_connection(error: BaseException) -> None:
    connection = Connection([b"first", error, b"third"])
    with pytest.raises(type(error)):
        read_many(_client(connection), [("GET", "a"), ("GET", "b"), ("GET", "c")])
    assert connection.fate == ["disconnected", "released"]


#: A book, with a field that only scripts read.
BOOK = {
    b"a.cpus": b"1000", b"epoch": b"3", b"incarnation": b"life", b"status": b"ready", b"queue": b"queue.w",
    b"lease": b"77", b"c.cpus": b"4000", b"c.queue:gpu": b"1", b"places": b"memory",
}  # fmt: skip


def test_book_is_read_in_either_protocol_and_order() -> None:
    flat = [part for field in BOOK.items() for part in field]
    turned = dict(reversed(BOOK.items()))
    book = parse_book("w", BOOK)
    assert book is not None
    assert book == parse_book("w", flat) == parse_book("w", turned)
    assert (book.epoch, book.lease, book.queue, book.kept) == (3, 77, "queue.w", "")
    assert (book.capacity, book.allocated) == ({"cpus": 4000, "queue:gpu": 1}, {"cpus": 1000})


@pytest.mark.parametrize("torn", [b"epoch", b"lease"])
def test_torn_book_is_no_book(torn: bytes) -> None:
    assert parse_book("w", {field: value for field, value in BOOK.items() if field != torn}) is None
    assert parse_book("w", []) is None
    assert part_book({field: value for field, value in BOOK.items() if field != torn}) is None


def test_parts_of_a_book_have_its_kind_allocations_and_lease() -> None:
    other = BOOK | {b"a.cpus": b"3000", b"incarnation": b"another", b"lease": b"99"}
    parts, others = part_book(BOOK), part_book(other)
    assert parts is not None
    assert others is not None
    assert parts[0] == others[0]
    assert (parts[1][1], parts[2], others[1][1], others[2]) == ((b"1000",), 77, (b"3000",), 99)
    for field in (b"c.cpus", b"epoch", b"status"):
        changed = part_book(BOOK | {field: b"5"})
        assert changed is not None
        assert changed[0] != parts[0]
