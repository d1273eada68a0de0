"""Messages to systemd about this service: ready, alive, stopping (sd_notify(3), without its library).

systemd names a datagram socket in NOTIFY_SOCKET where the unit has `Type=notify`. Each message is one datagram of lines
such as READY=1. systemd takes them from the main process alone, unless the unit says otherwise.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Final

from celery_capacity.routing.lasting_warning import LastingWarning

logger = logging.getLogger(__name__)

#: Path of the socket; one that begins with @ is in Linux's abstract namespace.
SOCKET: Final = "NOTIFY_SOCKET"
#: Microseconds within which systemd wants a sign of life, and the process that it wants it from.
WATCHDOG: Final = "WATCHDOG_USEC"
WATCHDOG_PID: Final = "WATCHDOG_PID"

READY: Final = "READY=1"
ALIVE: Final = "WATCHDOG=1"
STOPPING: Final = "STOPPING=1"


class Notifier:
    """Sender of messages to systemd. Does nothing where systemd asked for none."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = _address_of(environ.get(SOCKET, ""))
        self._warning = LastingWarning(logger)
        #: Seconds within which systemd wants a sign of life of this process; None where it wants none.
        self.watchdog = _watchdog_of(environ) if self._address else None

    @property
    def wanted(self) -> bool:
        """Return True if systemd listens."""
        return bool(self._address)

    def tell(self, *lines: str) -> None:
        """Send lines as one message. A socket that is gone or full ends nobody's work: it is logged."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.sendto("\n".join(lines).encode(), self._address)
            self._warning.over()
        except OSError as error:
            self._warning.warn(f"systemd hears nothing of this worker at {self._address!r}: {error}")


def _address_of(path: str) -> str:
    """Return the address that the socket module takes, "" for no path and for a kind of socket that it has not."""
    if path.startswith("@"):
        return "\0" + path[1:]
    return path if path.startswith("/") else ""


def _watchdog_of(environ: Mapping[str, str]) -> float | None:
    microseconds, pid = environ.get(WATCHDOG, ""), environ.get(WATCHDOG_PID, "")
    if not microseconds.isdecimal() or (pid and pid != str(os.getpid())):
        return None
    return int(microseconds) / 1e6
