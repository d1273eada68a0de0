"""The stores that one process uses: settings, the engine for Postgres, the client for Redis, the ledger.

Made on first use and never carried over a fork: a child that touches them makes its own.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import redis
from sqlalchemy import Engine, NullPool, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.config import task_rules, timeouts
from celery_capacity.routing.config.embedded import running_pair
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.config.task_rules import RequestRules
from celery_capacity.routing.database import deadlines
from celery_capacity.routing.database.authority import database_id
from celery_capacity.routing.database.postgres import ENCODING, PINNED, hide_values, translate
from celery_capacity.routing.errors import NoServers, StoreUnavailable
from celery_capacity.routing.insert.fast_single import Inserter
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.workers.dispatch.circuit_breaker import Breaker
from celery_capacity.workers.process.fork_safety import let_go
from celery_capacity.workers.process.job_watcher import Watcher
from celery_capacity.workers.process.spare_connections import close_spare

#: The fewest seconds that libpq counts for a connection.
CONNECT_AT_LEAST: Final = 2

Resolve = Callable[[Settings], Settings]


def resolve_running(settings: Settings) -> Settings:
    """The settings with the URLs of the user's running embedded servers; starts nothing."""
    pair = running_pair(settings.home)
    if pair is None:
        raise NoServers(
            "neither REDIS_URL nor DATABASE_URL is set, and no embedded servers run",
            advice="Set both, or start a platform on this machine with `celery -A platform up`.",
        )
    return settings.with_urls(pair.redis_url, pair.database_url)


def make_engine(
    url: str, *, pooled: bool = True, timeout: float = timeouts.STORE_TIMEOUT, most: float = deadlines.LONG
) -> Engine:
    """An engine whose statements are autocommitted one by one, with short time-outs. `pooled`: False where whoever
    connects keeps the connection. A call is given up after `timeout` seconds (`routing.database.deadlines`), and the
    server ends a statement after `most` times as many."""
    pool: dict[str, Any] = {"pool_size": 1, "max_overflow": 9, "pool_timeout": timeouts.CONNECT * timeout}
    options = {
        "lock_timeout": max(1, round(timeout * timeouts.LOCK * 1000)),
        "statement_timeout": max(1, round(timeout * most * 1000)),
        "application_name": "celery-capacity",
    }
    engine = create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        # Arguments and results of jobs are in no log, whatever prints an error.
        hide_parameters=True,
        # Autocommitted statements leave nothing to roll back: the reset would cost a round trip each time.
        pool_reset_on_return=None,
        **(pool if pooled else {"poolclass": NullPool}),
        connect_args={
            "connection_factory": deadlines.connection_factory(timeout),
            # A server that went away without a word is noticed in seconds, not in hours (over TCP).
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": max(1, round(timeout * 1000)),
            "options": " ".join([PINNED, *(f"-c {name}={value}" for name, value in options.items())]),
            # Not that of the person's environment: results and errors are any text.
            "client_encoding": ENCODING,
        },
    )
    hide_values(engine)
    event.listen(engine, "do_connect", partial(_limit_connecting, timeouts.CONNECT * timeout))
    event.listen(engine, "connect", lambda connection, _: _connections.add(connection))
    return engine


def _limit_connecting(most: float, _dialect: Any, _record: Any, _arguments: Any, options: dict[str, Any]) -> None:
    """Give a new connection no more time than its user has, and `most` seconds."""
    options["connect_timeout"] = round(max(CONNECT_AT_LEAST, min(most, deadlines.left())))


def transactions(engine: Engine) -> Engine:
    """The same engine, for statements that belong together."""
    return engine.execution_options(isolation_level="READ COMMITTED")


class Stores:
    """One for each app; `settings`, `engine`, `redis`, `ledger` and others are made when they are first asked for."""

    def __init__(self, resolve: Resolve = resolve_running) -> None:
        self._resolve = resolve
        self._made: dict[str, Any] = {}
        self._lock = threading.RLock()
        _all.add(self)

    def _get(self, name: str, make: Callable[[], Any]) -> Any:
        found = self._made.get(name)
        if found is None:
            with self._lock:
                found = self._made.get(name)
                if found is None:
                    found = self._made[name] = make()
        return found

    @property
    def made(self) -> Mapping[str, Any]:
        """Those that have been made, by name."""
        return self._made

    @property
    def settings(self) -> Settings:
        """Read from the environment once; with the URLs of the servers that serve. Raises `NoServers`."""
        found: Settings = self._get("settings", self._read_settings)
        return found

    def _read_settings(self) -> Settings:
        settings = Settings.from_environ(os.environ)
        return settings if settings.redis_url else self._resolve(settings)

    def settings_without_servers(self) -> Settings:
        """The same, without any URL where no servers are named or running."""
        try:
            return self.settings
        except NoServers:
            return Settings.from_environ(os.environ)

    @property
    def requests(self) -> RequestRules:
        """What `PLATFORM_REQUESTS` says of tasks. Raises `SettingsError`."""
        found: RequestRules = self._get("requests", lambda: task_rules.read(self.settings.requests))
        return found

    @property
    def engine(self) -> Engine:
        def make() -> Engine:
            return make_engine(str(self.settings.database_url), timeout=self.settings.store_timeout)

        found: Engine = self._get("engine", make)
        return found

    @property
    def direct(self) -> Engine:
        """Connections that are sessions of their own, each kept by whoever asks: for LISTEN and the locks of sessions.
        Where `engine` goes through a pooler, PLATFORM_DIRECT_DATABASE_URL names the server itself."""

        def make() -> Engine:
            url = str(self.settings.direct_database_url or self.settings.database_url)
            return make_engine(url, pooled=False, timeout=self.settings.store_timeout)

        found: Engine = self._get("direct", make)
        return found

    @property
    def inserter(self) -> Inserter:
        """Inserts the jobs that are submitted one by one."""

        def make() -> Inserter:
            url, timeout = str(self.settings.database_url), self.settings.store_timeout
            own = make_engine(url, pooled=False, timeout=timeout, most=timeouts.INSERT)
            return Inserter(own, self.engine)

        found: Inserter = self._get("inserter", make)
        return found

    def doubt_connections(self) -> None:
        """One connection to Postgres broke: with a restart all did, so those that nobody uses now are made anew."""
        # As SQLAlchemy does where it sees the error itself. (`dispose` would leave what others use now to a pool that
        # nobody empties.)
        self.engine.pool._invalidate(None)  # type: ignore[arg-type]
        self.inserter.doubt()

    def apart(self) -> Stores:
        """The same settings and engine with a handle of the ledger of its own: the epoch of a handle is its user's."""
        twin = Stores(self._resolve)
        twin._made = {"settings": self.settings, "engine": self.engine}
        return twin

    @property
    def ledger(self) -> Ledger:
        found: Ledger = self._get("ledger", self.new_ledger)
        return found

    def new_ledger(self) -> Ledger:
        """A handle of the ledger of its own: the epoch of a handle is its user's."""
        ledger = Ledger(self.settings)
        ledger.find_database = self.find_database
        return ledger

    def find_database(self) -> str:
        """The id of the database, asked for once. Raises `PlatformError` where Postgres does not say it."""
        found = self._made.get("database_id")
        if found is None:
            try:
                with self.engine.connect() as connection:
                    found = self._made["database_id"] = database_id(connection)
            except DBAPIError as error:
                raise translate(error) from error
            except PoolTimeout as error:
                raise StoreUnavailable("no connection to Postgres was free") from error
        return str(found)

    @property
    def sending(self) -> Breaker:
        """The ledger as senders ask it: with short time-outs, and not at all while it does not answer."""
        found: Breaker = self._get("sending", lambda: Breaker(self.settings, self.find_database))
        return found

    @property
    def watcher(self) -> Watcher:
        """Hears what becomes of the jobs that this process watches."""
        found: Watcher = self._get("watcher", lambda: Watcher(self.settings))
        return found

    def close_spare_connections(self) -> None:
        """Close the connections to Redis that nobody uses just now; they are made anew when they are needed."""
        for name in ("ledger", "sending"):
            if name in self._made:
                close_spare(self._made[name].client.connection_pool)

    @property
    def redis(self) -> redis.Redis:
        """The ledger's client."""
        return self.ledger.client

    def forget_after_fork(self) -> None:
        """In a child: drop what the parent made, without a word on the parent's connections."""
        self._lock = threading.RLock()
        for name in ("ledger", "sending", "watcher"):
            if name in self._made:
                let_go(self._made[name].descriptors())
        kept = ("settings", "requests", "database_id")
        made, self._made = self._made, {k: v for k, v in self._made.items() if k in kept}
        engine = made.get("engine")
        if engine is not None:
            engine.dispose(close=False)


_all: weakref.WeakSet[Stores] = weakref.WeakSet()
#: The driver's connections to Postgres, of all engines that were made here.
_connections: weakref.WeakSet[Any] = weakref.WeakSet()


def _after_fork() -> None:
    let_go([connection.fileno() for connection in _connections if not connection.closed])
    for stores in list(_all):
        stores.forget_after_fork()


os.register_at_fork(after_in_child=_after_fork)
