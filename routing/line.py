"""Connection on which an event loop calls scripts: it sends, and goes on until the reply is there.

redis-py waits for a reply in the thread that reads it. A loop must not wait, so it reads here as much as came.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any, Final

from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import ResponseError

#: Bytes read at once: most replies, with the messages of the jobs that are handed over.
_READ: Final = 256 * 1024
#: Bytes that the socket takes while its peer takes nothing: more than any call of a loop.
_BUFFER: Final = 256 * 1024
_END: Final = b"\r\n"
#: Version of the protocol that is read here.
RESP: Final = 2


class Line:
    """Connection with at most one call, of one or more commands, under way.

    `connection` is redis-py's own, connected, with its time-outs, on a socket without TLS.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._socket: socket.socket = connection._sock
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self._came = b""
        self._expected = 0

    def fileno(self) -> int:
        """Return the descriptor that is readable once a reply comes."""
        return self._socket.fileno()

    def send(self, commands: Sequence[Sequence[Any]]) -> None:
        """Send commands, and wait for nothing. Raises `OSError` or redis-py's errors, as `receive` does."""
        self._came, self._expected = b"", len(commands)
        packed = b"".join(self._connection.pack_commands(commands))
        if self._socket.send(packed, socket.MSG_DONTWAIT) < len(packed):
            # The server reads no more, and carries out no command of which it has a part.
            raise Disconnected("the ledger's server takes no more")

    def receive(self) -> list[Any] | None:
        """Read once; return the replies to all commands, None if they are not complete.

        Waits up to the connection's time-out where nothing came. An error that the server says is among the replies.
        Raises `OSError` or redis-py's errors, after which this connection is of no use.
        """
        came = self._socket.recv(_READ)
        if not came:
            raise Disconnected("the ledger's server closed the connection")
        self._came += came
        replies, at = [], 0
        for _ in range(self._expected):
            reply, at = _read(self._came, at)
            if at < 0:
                return None
            replies.append(reply)
        return replies

    def close(self) -> None:
        """Close the connection. A call that is under way may be carried out all the same."""
        self._connection.disconnect()


def _read(data: bytes, at: int) -> tuple[Any, int]:
    """Return the value that begins at a place of RESP 2, and the place after it; (None, -1) if it is not complete."""
    end = data.find(_END, at)
    if end < 0:
        return None, -1
    kind, head, at = data[at : at + 1], data[at + 1 : end], end + len(_END)
    if kind == b"$":
        size = int(head)
        if size < 0:
            return None, at
        end = at + size + len(_END)
        return (data[at : at + size], end) if len(data) >= end else (None, -1)
    if kind == b"*":
        items = []
        for _ in range(int(head)):
            item, at = _read(data, at)
            if at < 0:
                return None, -1
            items.append(item)
        return items, at
    if kind == b":":
        return int(head), at
    if kind == b"-":
        return ResponseError(head.decode("utf-8", "replace")), at
    return head, at
