"""The embedded servers: one pair of Redis and Postgres that all commands of a user share, and private pairs.

The shared pair lies in `Settings.home`: `redis/`, `postgres/`, `servers.json` with addresses, pids and start times, and
`servers.lock`. The lock is held while the pair is started or ended. Running servers are found by their own pid files,
not by `servers.json`. So a pair whose starter died half way is taken up where it stands, and no second server ever
opens the same data. Private pairs are for demo and tests.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO
from urllib.parse import urlsplit

from celery_capacity.platform.embedded import daemon, postgres, valkey
from celery_capacity.platform.embedded.starting import Start
from celery_capacity.routing.config import process_identity
from celery_capacity.routing.config.embedded import SERVERS_FILE, Pair, running_pair
from celery_capacity.routing.errors import NoServers, SettingsError, mask_url

if TYPE_CHECKING:
    from celery_capacity.routing.config.settings import Settings

#: Folder of files in memory, on Linux; and the bytes that must be free there for a pair that is not durable.
MEMORY: Final = Path("/dev/shm")
ROOM: Final = 2 * 2**30

#: Seconds for a server to say who is connected to it.
LOOK_SECONDS: Final = 5

# Ends a private pair whose owner died: the pipe to this script closes then. The script checks the command line before
# it kills, because pids are reused. It removes the folder $3 only if that folder was made for the pair; otherwise $3 is
# empty.
_WATCH = """
cat >/dev/null
mine() { { tr '\\0' '\\n' </proc/"$1"/cmdline || ps -p "$1" -o command=; } 2>/dev/null | grep -qF "$2"; }
redis=$(cd "$1" 2>/dev/null && pwd -P) && pid=$(cat "$redis/valkey.pid" 2>/dev/null) &&
    mine "$pid" "$redis" && kill -KILL "$pid"
postgres=$(cd "$2" 2>/dev/null && pwd -P) && pid=$(head -n 1 "$postgres/data/postmaster.pid" 2>/dev/null) &&
    mine "$pid" "$postgres" && kill -QUIT "$pid"
if [ -n "$3" ]; then
    while [ -e "$2/data/postmaster.pid" ] && mine "$pid" "$postgres"; do sleep 0.1; done
    rm -rf "$postgres" "$3"
fi
"""


def ensure(settings: Settings, say: Callable[[str], None] | None = None, beginning: Start | None = None) -> Settings:
    """Return the settings with both URLs: their own, or those of the shared pair, which is started if needed.

    Of two first commands at once, one starts the pair and the other waits for it. `say` gets the addresses in one line
    when a server was started; by default the line goes to stderr. `beginning` may be called off by another thread
    (CalledOff), and knows then whether servers were made. A start that fails leaves no server behind that did not run
    before. Raises CannotStart with the reason, and the errors of the migrations.
    """
    if settings.redis_url and settings.database_url:
        return settings
    beginning = beginning or Start()
    pair = running_pair(settings.home)
    if pair is None:
        beginning.step("Waiting for another command, which starts the servers.")
        with _locked(settings.home, beginning):
            pair = running_pair(settings.home) or _start_shared(settings.home, say or _to_stderr, beginning)
    return settings.with_urls(pair.redis_url, pair.database_url)


def stop(settings: Settings) -> list[str]:
    """End the shared pair and return a phrase for each ended server. The data stay.

    Raises NoServers if a server does not end.
    """
    if not settings.home.exists():
        return []
    with _locked(settings.home):
        return _stop(settings.home)


def stop_unused(settings: Settings) -> bool:
    """End the shared pair unless another program is connected to it. Return True if it ended. Raise NoServers."""
    with _locked(settings.home):
        pair = running_pair(settings.home)
        if pair is not None and _used(pair):
            return False
        _stop(settings.home)
    return True


def _used(pair: Pair) -> bool:
    """Return True if a connection other than this one leads to a server of the pair."""
    import psycopg2
    import redis

    clients = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    try:
        with closing(redis.Redis.from_url(pair.redis_url, socket_timeout=LOOK_SECONDS)) as client:
            if len(client.client_list()) > 1:
                return True
        url = pair.database_url.replace("postgresql+psycopg2://", "postgresql://", 1)
        with closing(psycopg2.connect(url, connect_timeout=LOOK_SECONDS)) as connection, connection.cursor() as cursor:
            cursor.execute(clients)
            row = cursor.fetchone()
            return row is not None and row[0] > 0
    except (redis.RedisError, psycopg2.Error):
        # A server that does not answer serves nobody.
        return False


def _stop(home: Path) -> list[str]:
    ended = []
    redis = valkey.running(_redis_folder(home))
    database = postgres.running(_postgres_folder(home))
    # End Postgres first: while it closes, nothing is admitted that it does not know.
    for name, server in (("Postgres", database), ("Redis", redis)):
        if server is None:
            continue
        if not server.stop():
            raise NoServers(
                f"{name} (process {server.process.pid}) does not end",
                advice=f"Look at its log in {home}, and end the process yourself.",
            )
        ended.append(f"{name} (process {server.process.pid}, {shown_url(server.url)})")
    (home / SERVERS_FILE).unlink(missing_ok=True)
    return ended


def describe(settings: Settings) -> str:
    """Return a line that says which servers serve these settings, with passwords masked."""
    if not (settings.redis_url and settings.database_url):
        return "no servers"
    pair = running_pair(settings.home)
    embedded = pair is not None and pair.redis_url == settings.redis_url
    kind = f"embedded servers in {settings.home}" if embedded else "servers"
    return f"{kind}: Redis {shown_url(settings.redis_url)}, Postgres {shown_url(settings.database_url)}"


@contextmanager
def private_pair(folder: Path | None = None, *, durable: bool = True, migrate: bool = True) -> Iterator[Pair]:
    """Run a private pair on a free port during the block, and end it also when this process is killed.

    `folder` holds its data and stays. Without `folder` the data are in a temporary folder that is removed with the
    pair. Without `durable`, for tests, nothing is synced to disk or all data are in memory, and the Redis has 1,024
    databases and DEBUG commands. The database is migrated unless `migrate` is false.
    """
    made = None if folder is not None else _temporary_folder(durable)
    home = folder or made
    assert home is not None
    # Start the watcher before the servers: it ends them whenever this process is killed.
    watcher = _watch(home.resolve(), made)
    try:
        redis = valkey.start(_redis_folder(home), 0, durable=durable)
        database = postgres.start(_postgres_folder(home), durable=durable)
        if migrate:
            _upgrade(database.url)
        yield _pair(home, redis, database)
    finally:
        # Look up the servers anew: a test may have killed one and started it again.
        for server in (valkey.running(_redis_folder(home)), postgres.running(_postgres_folder(home))):
            if server is not None:
                _ = server.stop() if durable and made is None else server.kill()
        if made is not None:
            shutil.rmtree(_postgres_folder(made).resolve(), ignore_errors=True)
            shutil.rmtree(made, ignore_errors=True)
        watcher.communicate()


def _start_shared(home: Path, say: Callable[[str], None], beginning: Start) -> Pair:
    postgres.check(_postgres_folder(home))
    with ExitStack() as on_failure:
        beginning.step("Starting Redis.")
        if valkey.running(_redis_folder(home)) is None:
            on_failure.callback(lambda: _stop_quietly(valkey.running(_redis_folder(home))))
        redis = valkey.start(_redis_folder(home), _last_port(home), beginning=beginning)
        if postgres.running(_postgres_folder(home)) is None:
            on_failure.callback(lambda: _stop_quietly(postgres.running(_postgres_folder(home))))
        database = postgres.start(_postgres_folder(home), beginning=beginning)
        beginning.step("Bringing the tables up to date.")
        _upgrade(database.url)
        pair = _pair(home, redis, database)
        _write(home / SERVERS_FILE, asdict(pair))
        on_failure.pop_all()
    beginning.made = True
    say(
        f"Started embedded servers in {home}: Redis {shown_url(pair.redis_url)}, "
        f"Postgres {shown_url(pair.database_url)}. They stay until `celery -A platform down`."
    )
    return pair


def _pair(home: Path, redis: valkey.Valkey, database: postgres.Postgres) -> Pair:
    return Pair(
        redis_url=redis.url,
        database_url=database.url,
        redis_pid=redis.process.pid,
        redis_ticks=redis.process.ticks,
        postgres_pid=database.process.pid,
        postgres_ticks=database.process.ticks,
        boot=process_identity.boot_id(),
        data=str(home.resolve()),
        version=version("celery-capacity"),
    )


def _upgrade(database_url: str) -> None:
    from celery_capacity.migrations import upgrade

    upgrade(database_url)


def _last_port(home: Path) -> int | None:
    """Return the Redis port of a pair that `down` did not end, or None.

    Workers that outlived a crash of Redis still connect to that port.
    """
    try:
        redis_url: str = json.loads((home / SERVERS_FILE).read_text())["redis_url"]
        return urlsplit(redis_url).port
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path: Path, value: object) -> None:
    """Write the file completely or not at all, because readers take no lock."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)


def make_home(home: Path) -> None:
    """Make the folder if it does not exist, and check that it is writable.

    Raises SettingsError, because PLATFORM_HOME names the folder.
    """
    try:
        if not home.exists():
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            _let_through(home)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        wrong = f"PLATFORM_HOME={str(home)!r} cannot be used: {error.strerror}"
        raise SettingsError([f"{wrong}. It must be a folder that you may write."]) from error


def _stop_quietly(server: valkey.Valkey | postgres.Postgres | None) -> None:
    if server is not None:
        server.stop()


@contextmanager
def _locked(home: Path, beginning: Start | None = None) -> Iterator[None]:
    make_home(home)
    try:
        with (home / "servers.lock").open("w") as file:
            daemon.until(lambda: _taken(file), math.inf, beginning)
            yield
    except OSError as error:
        raise NoServers(f"{error.filename or home}: {error.strerror}", advice=f"Look into {home}.") from error


def _taken(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _watch(home: Path, made: Path | None) -> subprocess.Popen[bytes]:
    folders = (_redis_folder(home), _postgres_folder(home), made or "")
    return subprocess.Popen(
        ["/bin/sh", "-c", _WATCH, "sh", *map(str, folders)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


def _temporary_folder(durable: bool) -> Path:
    """Make a temporary folder, in memory if the data need not outlive the machine and there is room.

    A database is copied in memory ten times as fast.
    """
    roomy = not durable and MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM
    folder = Path(tempfile.mkdtemp(prefix="celery-capacity-", dir=MEMORY if roomy else None))
    _let_through(folder)
    return folder


def _let_through(folder: Path) -> None:
    """Let the system user that runs Postgres for root pass through a folder of ours, without reading it."""
    if os.geteuid() == 0:
        folder.chmod(0o711)


def _redis_folder(home: Path) -> Path:
    return home / "redis"


def _postgres_folder(home: Path) -> Path:
    return home / "postgres"


def shown_url(url: str) -> str:
    """Return the URL for people: no driver, no password, and a readable path of the socket's folder."""
    return mask_url(url).replace("postgresql+psycopg2://", "postgresql://").replace("%2F", "/")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
