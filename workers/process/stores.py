"""Stores that a process uses: settings, the engine for Postgres, the client for Redis, the ledger.

They are made at their first use, and never carried over a fork: a child that touches them makes its own.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, TypeVar

import redis
from sqlalchemy import Engine, NullPool, create_engine, event

from celery_capacity.routing.config import task_rules, timeouts
from celery_capacity.routing.config.embedded import running_pair
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.config.task_rules import RequestRules
from celery_capacity.routing.database import deadlines
from celery_capacity.routing.database.authority import database_id
from celery_capacity.routing.database.postgres_errors import hide_values, translated
from celery_capacity.routing.database.resting_pool import MAX_KEPT, RestingPool
from celery_capacity.routing.database.server_checks import ENCODING, PINNED
from celery_capacity.routing.errors import NoServers, PlatformError
from celery_capacity.routing.insert.inserter import Inserter
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.model.reasons import Tally
from celery_capacity.workers.dispatch.breaker import Breaker
from celery_capacity.workers.dispatch.learned_times import LearnedTimes
from celery_capacity.workers.dispatch.submission_queue import SubmissionQueue
from celery_capacity.workers.process.fork_safety import let_go
from celery_capacity.workers.process.job_watcher import JobWatcher
from celery_capacity.workers.process.spare_connections import close_spare

#: The fewest seconds that libpq counts for a connection.
CONNECT_AT_LEAST: Final = 2

T = TypeVar("T")
Resolve = Callable[[Settings], Settings]


def resolve_running(settings: Settings) -> Settings:
    """Return the settings with the URLs of the user's running embedded servers. Starts nothing. Raises `NoServers`."""
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
    """Return an engine whose statements are autocommitted one by one, with short time-outs.

    `pooled`: False where the user of a connection keeps it. A call is given up after `timeout` seconds
    (`routing.database.deadlines`). The server ends a statement after `most` times as many.
    """
    pool: dict[str, Any] = {"poolclass": RestingPool, "pool_timeout": timeouts.CONNECT * timeout}
    options = {
        "lock_timeout": max(1, round(timeout * timeouts.LOCK * 1000)),
        "statement_timeout": max(1, round(timeout * most * 1000)),
        "application_name": "celery-capacity",
    }
    engine = create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        # Arguments and results of jobs come into no log, whatever code prints an error.
        hide_parameters=True,
        # Autocommitted statements leave nothing to roll back: the reset would cost a round trip each time.
        pool_reset_on_return=None,
        **(pool if pooled else {"poolclass": NullPool}),
        connect_args={
            "connection_factory": deadlines.connection_factory(timeout),
            # Over TCP, a server that went away without a word is noticed in seconds, not in hours.
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": max(1, round(timeout * 1000)),
            "options": " ".join([PINNED, *(f"-c {name}={value}" for name, value in options.items())]),
            # UTF-8 and not the encoding of the user's environment: results and errors can be any text.
            "client_encoding": ENCODING,
        },
    )
    hide_values(engine)
    event.listen(engine, "do_connect", partial(_limit_connecting, timeouts.CONNECT * timeout))
    event.listen(engine, "connect", lambda connection, _: _connections.add(connection))
    return engine


def _limit_connecting(most: float, _dialect: Any, _record: Any, _arguments: Any, options: dict[str, Any]) -> None:
    """Give a new connection no more time than its user has left, and at most `most` seconds."""
    options["connect_timeout"] = round(max(CONNECT_AT_LEAST, min(most, deadlines.left())))


def transactions(engine: Engine) -> Engine:
    """Return the engine for statements that belong together: in transactions, instead of autocommitted."""
    return engine.execution_options(isolation_level="READ COMMITTED")


class Stores:
    """Stores of an app: `settings`, `engine`, `redis`, `ledger` and others, each made when it is first asked for."""

    def __init__(self, resolve: Resolve = resolve_running) -> None:
        self._resolve = resolve
        self._made: dict[str, Any] = {}
        self._lock = threading.RLock()
        _all.add(self)

    def _get(self, name: str, make: Callable[[], T]) -> T:
        store: T | None = self._made.get(name)
        if store is None:
            with self._lock:
                store = self._made.get(name)
                if store is None:
                    store = self._made[name] = make()
        return store

    @property
    def made(self) -> Mapping[str, Any]:
        """Return the stores that have been made, by name."""
        return self._made

    @property
    def settings(self) -> Settings:
        """Return the settings, read from the environment once, with the URLs of the servers. Raises `NoServers`."""
        return self._get("settings", self._read_settings)

    def _read_settings(self) -> Settings:
        settings = Settings.from_environ(os.environ)
        return settings if settings.redis_url else self._resolve(settings)

    def settings_without_servers(self) -> Settings:
        """Return the settings, without any URL where no servers are named or running."""
        try:
            return self.settings
        except NoServers:
            return Settings.from_environ(os.environ)

    @property
    def requests(self) -> RequestRules:
        """Return the rules of `PLATFORM_REQUESTS` for tasks. Raises `SettingsError`."""
        return self._get("requests", lambda: task_rules.read(self.settings.requests))

    @property
    def engine(self) -> Engine:
        def make() -> Engine:
            return make_engine(str(self.settings.database_url), timeout=self.settings.store_timeout)

        return self._get("engine", make)

    def keep_connections(self) -> Engine:
        """Return `engine`, which from now on keeps connections that are in use. For the main process of a worker."""
        pool: Any = self.engine.pool
        pool.kept = MAX_KEPT
        return self.engine

    @property
    def direct(self) -> Engine:
        """Return an engine whose connections are sessions of their own: for LISTEN and the locks of sessions.

        Each connection is kept by its user. Where `engine` goes through a pooler, PLATFORM_DIRECT_DATABASE_URL names
        the server itself.
        """

        def make() -> Engine:
            url = str(self.settings.direct_database_url or self.settings.database_url)
            return make_engine(url, pooled=False, timeout=self.settings.store_timeout)

        return self._get("direct", make)

    @property
    def inserter(self) -> Inserter:
        """Return the inserter of jobs that are submitted one by one, with a connection of its own beside `engine`."""

        def make() -> Inserter:
            url, timeout = str(self.settings.database_url), self.settings.store_timeout
            engine = make_engine(url, pooled=False, timeout=timeout, most=timeouts.INSERT)
            return Inserter(engine, self.engine)

        return self._get("inserter", make)

    def apart(self) -> Stores:
        """Return stores with these settings and this engine, but with a handle of the ledger of their own.

        The epoch of a handle belongs to its user.
        """
        clone = Stores(self._resolve)
        clone._made = {"settings": self.settings, "engine": self.engine}
        return clone

    @property
    def ledger(self) -> Ledger:
        return self._get("ledger", self.new_ledger)

    def new_ledger(self) -> Ledger:
        """Return a new handle of the ledger, since the epoch of a handle belongs to its user."""
        ledger = Ledger(self.settings)
        ledger.find_database = self.find_database
        return ledger

    def find_database(self) -> str:
        """Return the id of the database, asked for once. Raises `PlatformError` where Postgres does not tell it."""
        database = self._made.get("database_id")
        if database is None:
            with translated(), self.engine.connect() as connection:
                database = self._made["database_id"] = database_id(connection)
        return str(database)

    @property
    def breaker(self) -> Breaker:
        """Return the ledger as senders ask it: with short time-outs, and not at all while it does not answer."""
        return self._get("breaker", lambda: Breaker(self.settings, self.tally, self.find_database))

    @property
    def tally(self) -> Tally:
        """Return the refusals of this process that the ledger has not counted yet."""
        return self._get("tally", Tally)

    @property
    def sending(self) -> SubmissionQueue:
        """Return the jobs of this process that are on their way to the ledger. Other questions go behind them."""
        return self._get("sending", lambda: SubmissionQueue(self.breaker))

    @property
    def learned(self) -> LearnedTimes:
        """Return the learned run times of tasks, which are read anew every other sweep."""
        return self._get("learned", lambda: LearnedTimes(lambda: self.engine, 2 * self.settings.sweep_interval))

    @property
    def watcher(self) -> JobWatcher:
        """Return the watcher that hears what becomes of the jobs that this process watches."""
        return self._get("watcher", lambda: JobWatcher(self.settings))

    def close_spare_connections(self) -> None:
        """Close the connections to Redis that nobody uses just now. They are made anew when they are needed."""
        for name in ("ledger", "breaker"):
            if name in self._made:
                close_spare(self._made[name].client.connection_pool)

    @property
    def redis(self) -> redis.Redis:
        """Return the ledger's client."""
        return self.ledger.client

    def forget_after_fork(self) -> None:
        """Drop, in a child, the stores that the parent made, and send nothing over the parent's connections."""
        self._lock = threading.RLock()
        for name in ("ledger", "breaker", "watcher"):
            if name in self._made:
                let_go(self._made[name].descriptors())
        kept = ("settings", "requests", "database_id")
        made, self._made = self._made, {k: v for k, v in self._made.items() if k in kept}
        engine = made.get("engine")
        if engine is not None:
            engine.dispose(close=False)


def stores_of(app: Any) -> Stores | None:
    """Return the stores of an app, None where the platform is not installed."""
    stores = getattr(app, "platform", None)
    return stores if isinstance(stores, Stores) else None


def platform_of(app: Any) -> Stores:
    """Return the stores of an app. Raises `PlatformError` where the platform is not installed."""
    stores = stores_of(app)
    if stores is None:
        advice = "Name another, by `celery -A platform` or app=, or call celery_capacity.install(app) in its module."
        raise PlatformError(f"the app {app.main!r} is not on the platform", advice=advice)
    return stores


_all: weakref.WeakSet[Stores] = weakref.WeakSet()
#: The driver's connections to Postgres, of all engines that were made here.
_connections: weakref.WeakSet[Any] = weakref.WeakSet()


def _after_fork() -> None:
    let_go([connection.fileno() for connection in _connections if not connection.closed])
    for stores in list(_all):
        stores.forget_after_fork()


os.register_at_fork(after_in_child=_after_fork)
