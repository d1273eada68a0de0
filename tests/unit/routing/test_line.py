"""Connection on which a loop reads what came of a reply, and waits for nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import ResponseError

from celery_capacity.routing.line import Line


class Connection:
    """The parts of redis-py's connection that a line uses."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def pack_commands(self, commands: Any) -> list[bytes]:
        return [" ".join(map(str, command)).encode() + b"\n" for command in commands]

    def disconnect(self) -> None:
        self._sock.close()


@pytest.fixture
def ends() -> Iterator[tuple[Line, socket.socket]]:
    mine, server = socket.socketpair()
    line = Line(Connection(mine))
    yield line, server
    line.close()
    server.close()


def test_reply_is_complete_only_with_its_last_byte(ends: tuple[Line, socket.socket]) -> None:
    line, server = ends
    line.send([("EVALSHA", "release"), ("EVALSHA", "claim")])
    assert server.recv(100) == b"EVALSHA release\nEVALSHA claim\n"
    reply = b"*4\r\n$2\r\nok\r\n:7\r\n$-1\r\n*1\r\n$4\r\n\r\n\r\n\r\n" + b"*1\r\n+OK\r\n"
    for at in range(len(reply) - 1):
        server.sendall(reply[at : at + 1])
        assert line.receive() is None, reply[: at + 1]
    server.sendall(reply[-1:])
    assert line.receive() == [[b"ok", 7, None, [b"\r\n\r\n"]], [b"OK"]]


def test_errors_of_the_server_are_among_the_replies(ends: tuple[Line, socket.socket]) -> None:
    line, server = ends
    line.send([("EVALSHA", "release"), ("EVALSHA", "claim")])
    server.sendall(b"-NOSCRIPT no such script\r\n*1\r\n$2\r\nok\r\n")
    replies = line.receive()
    assert replies is not None
    error, values = replies
    assert isinstance(error, ResponseError)
    assert str(error).startswith("NOSCRIPT")
    assert values == [b"ok"]


def test_closed_connection_is_an_error(ends: tuple[Line, socket.socket]) -> None:
    line, server = ends
    line.send([("EVALSHA", "release")])
    server.sendall(b"*1\r\n$2\r\no")
    assert line.receive() is None
    server.close()
    with pytest.raises((Disconnected, OSError)):
        line.receive()


def test_call_that_the_server_does_not_take_is_an_error_at_once(ends: tuple[Line, socket.socket]) -> None:
    line, _ = ends
    line.send([("EVALSHA", "x" * 2**16)])
    # A part of this call fits, and nothing of a further one.
    with pytest.raises(Disconnected):
        line.send([("EVALSHA", "x" * 2**24)])
    with pytest.raises(BlockingIOError):
        line.send([("EVALSHA", "x" * 2**16)])
