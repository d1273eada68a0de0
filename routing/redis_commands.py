"""Text of commands as Redis reads them.

The driver cuts a command into pieces of 6 kB. Each piece is a system call, after which a thread waits for the
interpreter: 33 times for a call that brings 100 jobs. Here a command is one piece, made in half the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from redis.exceptions import DataError

try:
    from redis import DriverInfo
except ImportError:
    #: Options by which a connection tells the server its driver. This redis-py reads its version once, when it is
    #: imported. One with `DriverInfo` looks for it among the installed packages for each connection, in 0.5 ms.
    DRIVER: Final[dict[str, Any]] = {}
else:
    DRIVER = {"driver_info": DriverInfo()}  # type: ignore[misc]


class CommandPacker:
    """Packer of commands, for the option `command_packer` of redis-py's connections."""

    def pack(self, *command: Any) -> list[bytes]:
        """Return the text of a command in one piece. A name of two words, such as CONFIG GET, is two arguments."""
        name, *values = command
        arguments = [*_bytes(name).split(), *values]
        pieces = [b"*%d" % len(arguments)]
        for value in arguments:
            kind = type(value)
            # The two usual types come first, without a call.
            data = value if kind is bytes else value.encode() if kind is str else _bytes(value)
            pieces += (b"\r\n$%d\r\n" % len(data), data)
        pieces.append(b"\r\n")
        return [b"".join(pieces)]


def packed_reading(command: Sequence[str]) -> bytes:
    """Return the text of a command of words that are text, as those that read many keys at once are."""
    words = [word.encode() for word in command]
    return b"*%d\r\n" % len(words) + b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])


def _bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return repr(value).encode()
    raise DataError(f"an argument of type {type(value).__name__} cannot be sent; make it bytes, text or a number")
