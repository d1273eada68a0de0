"""The server that holds the ledger: connections, the run of the server that they lead to, and calls of scripts."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, OutOfMemoryError, RedisError, ResponseError
from redis.retry import Retry

from celery_capacity.routing import format_versions, os_threads, redis_commands
from celery_capacity.routing.config import redis_urls, timeouts
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.errors import NotMigrated, PlatformError, StoreUnavailable, Unsupported, mask_url
from celery_capacity.routing.ledger import keys, sentinels
from celery_capacity.routing.ledger.replies import LedgerClosed, LedgerFull
from celery_capacity.routing.ledger.scripts import Script, load
from celery_capacity.routing.ledger.signatures import Group, Reply
from celery_capacity.routing.model.reasons import Tally

#: Seconds that a reader waits for the ledger before it asks Postgres.
PATIENCE: Final = 1.0
#: The oldest Redis that has all commands which the scripts use, and the first that reads their line `#!lua flags=…`.
#: Valkey reports itself as Redis 7.2 in `redis_version`.
OLDEST: Final = (6, 2)
WITH_FLAGS: Final = (7, 0)
#: Mark of a full server in the error of a script on Redis 6.2, which wraps the error of the command.
WRAPPED_OOM: Final = "-OOM "
#: Milliseconds for which the key of a probe stays.
PROBE_MS: Final = 1000


def connect(url: str, timeout: float = timeouts.STORE_TIMEOUT, **options: Any) -> redis.Redis:
    """Return a client with short time-outs that never retries by itself (redis-py retries by default).

    `url`: any form that `routing.config.redis_urls` reads. `timeout`: PLATFORM_STORE_TIMEOUT, in seconds. `options`:
    those of redis-py.
    """
    options = {
        "socket_connect_timeout": timeouts.CONNECT * timeout,
        "socket_timeout": timeouts.ANSWER * timeout,
        "socket_keepalive": True,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        "command_packer": redis_commands.CommandPacker(),
        **redis_commands.DRIVER,
        **options,
    }
    address = redis_urls.read(url)
    if address.scheme == redis_urls.SENTINEL:
        return os_threads.by_thread(sentinels.client(address, options, timeout))
    if not address.path:
        return os_threads.by_thread(redis.Redis.from_url(url, **options))
    del options["socket_keepalive"]
    options |= {"username": address.user, "password": address.password, "db": address.number, "path": address.path}
    pool = redis.ConnectionPool(redis.UnixDomainSocketConnection, **options)
    return os_threads.by_thread(redis.Redis.from_pool(pool))


def quick_client(client: redis.Redis, patience: float = PATIENCE) -> redis.Redis:
    """Return a client of the same server that gives up after `patience` seconds and never retries."""
    pool = client.connection_pool
    options = {
        **pool.connection_kwargs,
        "socket_timeout": patience,
        "socket_connect_timeout": patience,
        "retry": Retry(NoBackoff(), 0),
    }
    # A reader has no use for the questions that the ledger asks on each new connection.
    options.pop("redis_connect_func", None)
    return redis.Redis(connection_pool=redis.ConnectionPool(pool.connection_class, **options))


def tombstone_ms(settings: Settings) -> int:
    """Return the milliseconds for which the ledger remembers an ended job."""
    return max(2, round(settings.tombstone * 1000))


def scripts_for(settings: Settings, *, flags: bool) -> dict[str, Script]:
    """Return the scripts with these settings in them. `flags`: see `load`."""
    start_ms = round(settings.start_timeout * 1000)
    return load(start_ms, tombstone_ms(settings), settings.max_ledger_backlog, flags, settings.share_halves_in)


class LedgerServer:
    """Calls scripts on one server, in the epoch that this process has confirmed in Postgres."""

    def __init__(self, settings: Settings, client: redis.Redis | None = None) -> None:
        if settings.redis_url is None and client is None:
            raise StoreUnavailable("no ledger is configured", advice="set REDIS_URL")
        self.settings = settings
        #: The epoch in which this process may act; 0 before it was confirmed.
        self.epoch = 0
        self._run_id = ""
        #: The id of the Postgres database to which the books must belong, "" before it was found; and its finder.
        self.database = ""
        self.find_database: Callable[[], str] | None = None
        #: Counts that go with the next call.
        self.tally = Tally()
        #: For each thread: the run of the server that its arguments name, until they are sent.
        self._meant = threading.local()
        self._connections: weakref.WeakSet[Any] = weakref.WeakSet()
        self._clock_offset_ms = 0.0
        self.client = client if client is not None else connect(str(settings.redis_url), settings.store_timeout)
        pool = self.client.connection_pool
        pool.connection_kwargs["redis_connect_func"] = self._on_connect
        #: The most milliseconds from reading a row to its submit: half of the time for which an ended job is
        #: remembered. So the ledger still remembers a job that ended after its row was read.
        self.submit_limit_ms = tombstone_ms(settings) // 2
        self._scripts = scripts_for(settings, flags=True)

    def _on_connect(self, connection: Any) -> None:
        """Ask on each new connection for the run of the server, and for the difference between its clock and ours."""
        self._connections.add(connection)
        connection.on_connect()
        connection.send_command("INFO", "server")
        text = connection.read_response()
        text = text.decode() if isinstance(text, bytes) else str(text)
        about = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        previous, self._run_id = self._run_id, about["run_id"].strip()
        if previous and previous != self._run_id:
            # The call under way was meant for another run of the server, perhaps with other books.
            raise redis.ConnectionError("the server has restarted")
        version = tuple(map(int, about.get("redis_version", "7.0").strip().split(".")[:2]))
        if version < OLDEST:
            connection.disconnect()
            raise self._too_old(about["redis_version"].strip())
        self._scripts = scripts_for(self.settings, flags=version >= WITH_FLAGS)
        before = time.time()
        connection.send_command("TIME")
        seconds, micros = connection.read_response()
        after = time.time()
        self._clock_offset_ms = (int(seconds) + int(micros) / 1e6 - (before + after) / 2) * 1000

    @property
    def ttl_ms(self) -> int:
        """Return the milliseconds for which a heartbeat renews a lease."""
        return round(self.settings.worker_ttl * 1000)

    def measure(self) -> int:
        """Ask for the server's clock, and return it in milliseconds.

        Either clock may have been set since a connection was made.
        """
        seconds, micros = self._guard(lambda: self.client.time())
        self.hear(seconds * 1000 + micros / 1000)
        return self.now_ms()

    def hear(self, server_ms: float) -> None:
        """Take over the server's clock from a reply, in milliseconds.

        Where the reply was slow, deadlines are earlier by that delay from here on, never later.
        """
        self._clock_offset_ms = server_ms - time.time() * 1000

    def _too_old(self, version: str) -> PlatformError:
        needed = ".".join(map(str, OLDEST))
        return PlatformError(
            f"Redis at {mask_url(self.settings.redis_url or '')} is version {version}, and the ledger needs {needed}",
            value=version,
            advice=f"Use Redis {needed} or newer, better 7, or Valkey.",
        )

    def descriptors(self) -> list[int]:
        """Return the descriptors of this handle's sockets, for a child process that inherited them."""
        sockets = [getattr(connection, "_sock", None) for connection in self._connections]
        return [socket.fileno() for socket in sockets if socket is not None and socket.fileno() >= 0]

    @property
    def run_id(self) -> str:
        """Return the server's `run_id`, as of the newest connection; connect where there is none yet."""
        if not self._run_id:
            self._guard(lambda: self.client.ping())
        return self._run_id

    def ping(self) -> None:
        """Raise `StoreUnavailable` where the server does not answer quickly."""
        client = quick_client(self.client, timeouts.QUICK_ANSWER * self.settings.store_timeout)
        try:
            self._guard(client.ping)
        finally:
            client.connection_pool.disconnect()

    def probe(self) -> None:
        """Raise `StoreUnavailable` where the ledger cannot be written."""
        self._guard(lambda: self.client.set(keys.PROBE, "", px=PROBE_MS))

    def now_ms(self) -> int:
        """Return this process's estimate of the server's clock, in milliseconds."""
        return self.server_ms(time.time() * 1000)

    def server_ms(self, own_ms: float) -> int:
        """Convert a time of this process's clock to the server's clock, in milliseconds."""
        return round(own_ms + self._clock_offset_ms)

    def _guard(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except RedisError as error:
            raise self._translated(error) from error

    def _translated(self, error: RedisError) -> StoreUnavailable:
        where = mask_url(self.settings.redis_url or "")
        full = isinstance(error, OutOfMemoryError) or WRAPPED_OOM in str(error)
        kind = LedgerFull if full else StoreUnavailable
        return kind(f"Redis at {where} does not serve: {error}")

    def _call(self, script: str, groups: Iterable[Group] = (), **values: Any) -> Reply:
        """Call a script, with its arguments and those of its groups by their names in the header."""
        return self._reply(script, self._calls([self._prepared(script, groups, **values)])[0])

    def _prepared(self, script: str, groups: Iterable[Group] = (), **values: Any) -> tuple[str, list[Any]]:
        """Return a call for `_calls`, in the epoch of this process unless `values` names another."""
        signature = self._scripts[script].signature
        if signature.has_gate and "epoch" not in values:
            values["epoch"], values["run_id"] = self._gate()
        return script, signature.arguments(values, groups)

    def _reply(self, script: str, values: list[str]) -> Reply:
        return Reply(self._scripts[script].signature, values)

    def _calls(self, calls: Sequence[tuple[str, Sequence[Any]]]) -> list[list[str]]:
        """Send the calls in one round trip; each is atomic by itself. Raise the first refusal or error."""
        self.run_id  # noqa: B018 - the first use connects
        meant, self._meant.run_id = getattr(self._meant, "run_id", ""), ""
        replies: list[Any] | None = None
        try:
            if len(calls) == 1 and not self.tally:
                name, args = calls[0]
                with suppress(NoScriptError):
                    replies = [self.client.evalsha(self._scripts[name].sha, 0, *args)]
            if replies is None:
                replies = self._send(calls)
        except RedisError as error:
            raise self._translated(error) from error
        return self._checked(meant, replies)

    def _checked(self, meant: str, replies: Sequence[Any]) -> list[list[str]]:
        """Return the values of replies to a call that named the run `meant`. Raise the first refusal."""
        if meant and meant != self._run_id:
            # Another thread's connection met the new run of the server first. If the server came back with old books,
            # the scripts accepted these arguments. The opener of the next epoch discards the changes they made.
            raise StoreUnavailable("the ledger's server has restarted", advice="ask again")
        results = []
        for reply in replies:
            values = [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in reply]
            if values[0] == "cold":
                raise LedgerClosed(None)
            if values[0] == "epoch":
                raise LedgerClosed(int(values[1]))
            if values[0] == "foreign":
                raise self._foreign(values[1])
            results.append(values)
        return results

    def _send(self, calls: Sequence[tuple[str, Sequence[Any]]]) -> list[Any]:
        """Send the calls and the counts of the tally; the server may not know the scripts yet."""
        pipe = self.client.pipeline(transaction=False)
        for name, args in calls:
            pipe.evalsha(self._scripts[name].sha, 0, *args)
        replies = self.execute(pipe, raise_on_error=False)
        for index, reply in enumerate(replies):
            if isinstance(reply, NoScriptError):
                name, args = calls[index]
                replies[index] = self.client.eval(self._scripts[name].text, 0, *args)
            elif isinstance(reply, ResponseError):
                raise reply
        return replies

    def execute(self, pipe: Any, *, raise_on_error: bool = True) -> list[Any]:
        """Execute a pipeline that is no transaction, and tell the counts of the tally in the same round trip.

        Counts that the server did not take go with a later call.
        """
        commands, counts = len(pipe), self.tally.take()
        for name, times in counts.items():
            pipe.hincrby(keys.COUNTERS, name, times)
        replies: list[Any] = []
        try:
            replies = pipe.execute(raise_on_error=False)
        finally:
            if not replies or isinstance(replies[-1], RedisError):
                self.tally.add_all(counts)
        for reply in replies[:commands] if raise_on_error else ():
            if isinstance(reply, RedisError):
                raise reply
        return replies[:commands]

    def _gate(self) -> tuple[str, str]:
        self._meant.run_id = self.run_id
        return str(self.epoch), self._caller(self.run_id)

    def _caller(self, run_id: str) -> str:
        """Return the `run_id` argument: the server's run, and the database to which the books must belong."""
        database = self.own_database()
        return f"{run_id}/{database}" if database else run_id

    def own_database(self) -> str:
        """Return the id of the caller's database, "" where none was named.

        Raises `PlatformError` where Postgres does not say it.
        """
        if not self.database and self.find_database is not None:
            self.database = self.find_database()
        return self.database

    def _foreign(self, owner: str) -> Unsupported:
        where = mask_url(self.settings.redis_url or "")
        return Unsupported(
            f"the Redis database {where} has the ledger of another Postgres database",
            value=owner,
            advice="Give each platform a Redis database of its own (the number at the end of REDIS_URL). Where that"
            " Postgres database is gone for good, empty this Redis database: redis-cli -n NUMBER FLUSHDB.",
        )

    def announce(self, jobs: Sequence[str]) -> None:
        """Tell watchers of these jobs to look at the rows, because no script has published the changes."""
        pipe = self.client.pipeline(transaction=False)
        for job in jobs:
            pipe.publish(keys.job(job), "")
        self._guard(pipe.execute)

    # -- epochs --------------------------------------------------------------------------------------------------

    def opened(self) -> tuple[int, str] | None:
        """Return the epoch and the server run in which the ledger was opened, or None where it is cold or older.

        Raises `NotMigrated` where a newer release opened it, in a format that this release does not know. Raises
        `Unsupported` where it was opened for another database.
        """
        fields = self._guard(lambda: self.client.hmget(keys.EPOCH, "epoch", "run_id", "format", "database"))
        written = int(fields[2] or format_versions.FIRST)
        if written > format_versions.LEDGER:
            raise NotMigrated(
                f"the ledger is of format {written}, and this version of the platform knows {format_versions.LEDGER}",
                value=written,
                advice="Install the version of the platform that opened it.",
            )
        owner = (fields[3] or b"").decode()
        if owner and self.database and owner != self.database:
            raise self._foreign(owner)
        if fields[0] is None or fields[1] is None or written < format_versions.LEDGER:
            return None
        return int(fields[0]), fields[1].decode()

    def is_cold(self) -> bool:
        """Return True if nobody may admit: the ledger is cold.

        A cold ledger was never opened, or was emptied, or was opened in another run of the server. A restart of the
        server may have brought back old books.
        """
        opened = self.opened()
        return opened is None or opened[1] != self.run_id

    def has_whole_stream(self) -> bool:
        """Return True if the books are of this run of the server, so that no stream entry was lost with another."""
        run_id = self._guard(lambda: self.client.hget(keys.EPOCH, "run_id"))
        return run_id is not None and run_id.decode() == self.run_id

    def is_unfinished(self) -> bool:
        """Return True if the rebuild of this epoch has not reached its end: it runs, or its process died."""
        return bool(self._guard(lambda: self.client.hexists(keys.EPOCH, "rebuilding")))

    def close_epoch(self, epoch: int, run_id: str, step: str, names: Sequence[str | bytes] = ()) -> None:
        """Take one step of closing the books for the process that opens this epoch.

        The step `begin` closes the books, `remove` removes keys of the older epoch, and `carry` carries jobs over. Each
        call takes at most 1,000 names. `run_id`: that of the server on which the process began. Raises `LedgerClosed`
        where a newer epoch is opened.
        """
        self._meant.run_id = run_id
        rows = [{"name": name} for name in names]
        self._call("close_epoch", rows, opening=epoch, run_id=self._caller(run_id), step=step)

    def open_epoch(
        self, epoch: int, run_id: str | None = None, version: int = 0, controls: Iterable[Group] = ()
    ) -> None:
        """Open an epoch on empty books, with controls of a version; `run_id` as in `close_epoch`, None: the current."""
        self._meant.run_id = run_id or self.run_id
        caller = self._caller(run_id or self.run_id)
        reply = self._call("open_epoch", controls, opening=epoch, run_id=caller, version=version)
        # From now on the rows that this process reads are newer than the epoch, also by its own estimate of the clock.
        self.hear(reply.number("now"))
        self.epoch = epoch

    def finish_epoch(self, epoch: int) -> None:
        """Note that the rebuild of this epoch is done. Raise `LedgerClosed` where a newer epoch is open."""
        self._call("finish_epoch", epoch=epoch, run_id=self._caller(self.run_id))
